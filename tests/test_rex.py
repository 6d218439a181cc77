"""REx: each order divides the error as the paper says, and the sum of matrices is what the format holds and the layers multiply by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stories import STORIES, needs_stories
from weights import random_weight

from pyengine import ops
from pyengine.errors import CheckpointError
from pyengine.formats import open_checkpoint
from pyengine.inspect import describe, linear_bits
from pyengine.layers import Gated, SideBySide, Summed, linear
from pyengine.linear import Linear, stack
from pyengine.loader import load
from pyengine.qtensor import ORDERS, QTensor
from pyengine.quant import rex
from pyengine.quant.common import Spec
from pyengine.quantizer import quantize


def summed(n: int, k: int, *rows: int, bias: bool = False) -> QTensor:
    """A weight whose orders from the second on have so many rows, 0 for all of those before."""
    q = last = random_weight(n, k, 32, mask="sparse", bias=bias, columns=2)
    for r in rows:
        last.residual = random_weight(r or last.n, k, 32, asymmetric=True, mask="sparse")
        last.residual.rows = torch.randperm(last.n)[:r].sort().values.int() if r else None
        last = last.residual
    return q.check()


def test_the_sum_of_matrices_is_what_is_dequantized():
    q = summed(20, 64, 7, 0, 3)
    expected = replace(q, residual=None).dequantize()
    second, third, fourth = q.residual, q.residual.residual, q.residual.residual.residual
    inner = replace(third, residual=None).dequantize()
    inner[fourth.rows.long()] += fourth.dequantize()
    inner += replace(second, residual=None).dequantize()
    expected[second.rows.long()] += inner
    assert torch.allclose(q.dequantize(), expected, atol=1e-6) and torch.equal(q.dequantize(torch.tensor([3, 3])), q.dequantize()[[3, 3]])
    stored = {f"a.{key}": t for key, t in q.tensors().items()}
    assert "a.residual.rows" in stored and "a.residual.residual.rows" not in stored and "a.residual.residual.residual.rows" in stored
    assert torch.equal(QTensor.read("a", 20, 64, stored.get).dequantize(), q.dequantize())
    assert q.nbytes == sum(t.numel() * t.element_size() for t in stored.values())


@pytest.mark.parametrize(
    ("message", "change"),
    {
        r"a.residual.rows: must rise strictly within 0..19": lambda t: t["a.residual.rows"].fill_(4),
        r"a.residual.rows: must rise strictly within": lambda t: t["a.residual.rows"][-1:].fill_(20),
        r"a.residual.rows: dtype int64": lambda t: t.update({"a.residual.rows": t["a.residual.rows"].long()}),
        r"a.residual.weight: shape \[7, 32\], expected \[20": lambda t: t.pop("a.residual.rows"),
        r"a.residual.scale: missing": lambda t: t.pop("a.residual.scale"),
        r"a.residual.weight: missing": lambda t: t.pop("a.residual.weight"),
        r"a.residual.scale: 1 values are NaN": lambda t: t["a.residual.scale"][2, 1].fill_(torch.nan),
        r"a.residual: a residual of 64 inputs with a bias": lambda t: t.update({"a.residual.bias": torch.zeros(7).half()}),
    }.items(),
)
def test_a_broken_residual_is_refused_by_name(message, change):
    stored = {f"a.{key}": t.clone() for key, t in summed(20, 64, 7).tensors().items()}
    change(stored)
    with pytest.raises(CheckpointError, match=message):
        QTensor.read("a", 20, 64, stored.get)


def test_orders_without_end_are_refused():
    stored = {f"{'a.' + 'residual.' * i}{key}": t for i in range(ORDERS + 1) for key, t in random_weight(4, 32, 32).tensors().items()}
    with pytest.raises(CheckpointError, match="at most 8 matrices"):
        QTensor.read("a", 4, 32, stored.get)
    assert len(QTensor.read("a.residual.residual", 4, 32, stored.get).tensors()) == 2 * (ORDERS - 1)


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("group", (32, 0))
def test_each_order_divides_the_largest_error(bits, group):
    w = torch.randn(40, 96) * torch.rand(40, 1).add(0.1)
    spec = rex.complete(Spec(bits=bits, group_size=group, rows=1.0))
    errors = [float((w - rex.expand(w, replace(spec, orders=orders)).check(40).dequantize()).abs().max()) for orders in (1, 2, 3, 4)]
    for a, b in zip(errors, errors[1:]):
        assert b <= a / (2**bits - 2) * 1.02, errors  # 2 %: scales are rounded to float16


def test_the_rows_that_lost_most_come_first():
    w = torch.randn(40, 96)
    w[[3, 17, 30]] *= 50
    q = rex.expand(w, rex.complete(Spec(group_size=32, rows=0.075))).check(40)
    assert q.residual.rows.tolist() == [3, 17, 30]
    lost, before = (w - q.dequantize()).norm(dim=1), (w - replace(q, residual=None).dequantize()).norm(dim=1)
    assert [int(i) for i in (lost < before / 10).nonzero()] == [3, 17, 30]


@pytest.mark.parametrize("act_bits", (16, 8))
def test_layers_multiply_by_the_sum(act_bits):
    x, residual = torch.randn(5, 64), torch.randn(5, 20)
    for rows in ((7,), (0,), (7, 0, 3)):
        q = summed(20, 64, *rows, bias=True)
        layer = linear([q], act_bits)
        assert isinstance(layer, Summed)
        expected = x.double() @ q.dequantize().double().T + q.bias.double()
        limit = 1e-4 if act_bits == 16 else 3e-2
        assert (layer(x) - expected).norm() <= limit * expected.norm()
        out, program = residual.clone(), ops.Program()
        layer(x, out, out, program)
        program.run()
        assert torch.equal(out, layer(x, residual)) and (out - expected - residual).norm() <= limit * expected.norm()
    with pytest.raises(ValueError, match="has a residual"):
        Linear(q)


def test_weights_with_and_without_residuals_are_stacked():
    x = torch.randn(5, 64)
    for rows in (((7,), (), (5, 2)), ((0,), (0,)), ((), (0,))):
        parts = [replace(summed(20, 64, *r), column_index=None, column_value=None) for r in rows]
        joined = stack(parts).check()
        assert torch.equal(joined.dequantize(), torch.cat([p.dequantize() for p in parts]))
        expected = torch.cat([linear([p])(x) for p in parts], 1)
        assert torch.allclose(linear(parts)(x), expected, atol=1e-4)
    odd = [summed(20, 64, 7), replace(random_weight(20, 64, 64), residual=None)]
    assert isinstance(linear(odd), SideBySide)
    pair = [replace(summed(32, 64, 9), column_index=None, column_value=None) for _ in range(2)]
    gate, up = (x.double() @ p.dequantize().double().T for p in pair)
    layer = linear(pair, gated=True)
    assert isinstance(layer, Gated) and isinstance(layer.layer, Summed)
    assert torch.allclose(layer(x).double(), torch.nn.functional.silu(gate) * up, rtol=1e-3, atol=1e-2)


def test_scatter_add_adds_where_it_says():
    y, x = torch.randn(70, 9), torch.randn(70, 3)
    wide, column = torch.cat((y, torch.ones(70, 2)), 1), torch.tensor([8, 0, 4], dtype=torch.int32)
    expected = y.clone()
    expected[:, column.long()] += x
    ops.scatter_add(x, column, wide[:, :9])
    assert torch.equal(wide[:, :9], expected) and (wide[:, 9:] == 1).all()


@needs_stories
def test_checkpoints_load_and_lose_less(tmp_path):
    ids = [1, 403, 407, 261, 378]
    expected, losses = load(STORIES).logits(ids), []
    for name, options in (("rtn", {}), ("rex", {}), ("rex", {"rows": 1.0}), ("rex", {"rows": 1.0, "orders": 3})):
        out = tmp_path / f"out{len(losses)}"
        done = quantize(STORIES, out, name, group_size=32, head_bits=16, progress=lambda items, label: items, **options)
        engine = load(out)
        losses.append(float((engine.logits(ids) - expected).norm()))
        bits = done["bits_per_weight"]
        assert describe(open_checkpoint(out))["bits_per_weight"] == bits == pytest.approx(linear_bits(engine.model), rel=1e-6)
    assert losses[1] < losses[0] and losses[2] < losses[0] / 8 and losses[3] < losses[2] / 2, losses
    refused = (("orders", 9, "orders is 9"), ("rows", 0.0, "rows is 0.0"), ("rounding", "gptq", "what rounding"), ("grid", "search", "span"))
    for name, value, message in refused:
        with pytest.raises(ValueError, match=message):
            quantize(STORIES, tmp_path / "no", "rex", **{name: value})
