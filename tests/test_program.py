"""Recorded ops: the same results as ops that run at once, and tensors that stay alive."""

from __future__ import annotations

import gc

import pytest
import torch
from weights import random_weight

from pyengine import ops
from pyengine.cache import Batch
from pyengine.inspect import linear_bits
from pyengine.layers import Dense
from pyengine.linear import Linear
from pyengine.loader import load
from pyengine.quantizer import quantize


def test_a_program_repeats_its_ops_over_the_same_tensors():
    first, second = Linear(random_weight(64, 96, 32, mask="sparse")), Linear(random_weight(16, 32, 32))
    x, middle, half, y = torch.randn(3, 96), torch.empty(3, 64), torch.empty(3, 32), torch.zeros(3, 16)
    program = ops.Program()
    first(x, out=middle, program=program)
    ops.silu_mul(middle, out=half, program=program)
    second(half, residual=y, out=y, program=program)
    assert (y == 0).all()  # nothing has run yet
    total = torch.zeros(3, 16)
    for _ in range(3):
        x.normal_()
        program.run()
        total += second(ops.silu_mul(first(x)))
        assert torch.allclose(y, total, atol=1e-4)


def test_recording_refuses_what_running_would():
    layer = Linear(random_weight(8, 64, 32))
    layer.kernel = "no_such_kernel"
    with pytest.raises(RuntimeError, match="no kernel is called"):
        layer(torch.randn(1, 64), program=ops.Program())


def test_a_program_keeps_its_tensors_and_workspace_alive():
    layer, program = Linear(random_weight(64, 96, 32, mask="sparse")), ops.Program()
    out = torch.zeros(5, 64)
    layer(torch.ones(5, 96), out=out, program=program)
    expected = layer(torch.ones(5, 96))
    Linear(random_weight(8, 4096, 128))(torch.randn(300, 4096))  # a larger workspace takes the place of the recorded one
    gc.collect()
    junk = [torch.full((5, 96), torch.nan) for _ in range(50)]
    program.run()
    assert torch.equal(out, expected) and junk


def test_steps_of_a_quantized_model_are_recorded_and_a_float_model_runs(stories, tmp_path):
    report = quantize(stories, tmp_path / "q", method="rtn", group_size=32)
    model = load(tmp_path / "q").model
    assert linear_bits(model) == pytest.approx(report["bits_per_weight"], rel=1e-3)
    one, two = model.cache(2, 64), model.cache(2, 64)
    tokens, positions = [5, 9, 11, 400], [0, 1, 2, 3]

    def logits(cache, step):
        if step == "prefill":
            return model(Batch.of(tokens, [1] * 4, positions, cache), cache)
        return torch.cat([model(Batch.of([t], [1], [p], cache), cache) for t, p in zip(tokens, positions)])

    whole = logits(one, "prefill")
    assert model._recorded and list(model._recorded) == [(4, 4)]
    assert torch.allclose(logits(two, "step by step"), whole, atol=2e-2)
    assert list(model._recorded) == [(1, 1)]  # another cache, other programs
    for m in range(1, 20):
        model(Batch.of([1] * m, [0] * m, list(range(m)), one), one)
    assert len(model._recorded) == 8
    assert torch.equal(logits(one, "prefill"), whole)
    plain = load(stories).model
    assert any(isinstance(m, Dense) for m in plain.modules())
    cache = plain.cache(1, 8)
    plain(Batch.of([1], [0], [0], cache), cache)
    assert not plain._recorded
