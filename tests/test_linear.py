"""`Linear` as a drop-in for torch.nn.Linear, and the layers made of it."""

from __future__ import annotations

import copy
import io
import os
import signal
import threading

import pytest
import torch
from torch import nn
from test_memory import from_threads
from weights import random_weight

import pyengine
from pyengine import _C, ops
from pyengine.layers import Dense, Embedding, SideBySide, linear
from pyengine.linear import Linear, replace_linears, stack
from pyengine.qtensor import QTensor
from pyengine.quant.common import Spec, quantize_matrix


def test_from_float_keeps_what_the_weights_say():
    torch_linear = nn.Linear(256, 96)
    x = torch.randn(2, 5, 256)
    exact = torch_linear(x)
    errors = []
    for bits in (2, 3, 4, 8):
        layer = Linear.from_float(torch_linear, bits=bits, group_size=64, outliers=0.01)
        y = layer(x)
        assert y.shape == exact.shape and y.dtype == exact.dtype
        errors.append(((y - exact).norm() / exact.norm()).item())
        assert layer.outliers == int(0.01 * 96 * 256)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 and errors[2] < 0.15
    assert f"outliers={layer.outliers}" in repr(layer)


def test_other_dtypes_come_back_as_they_went_in():
    layer = Linear(random_weight(16, 64, 32))
    x = torch.randn(3, 64)
    assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()).bfloat16())
    assert layer(torch.randn(0, 64)).shape == (0, 16)
    assert torch.equal(layer(x.T.contiguous().T), layer(x))


def test_what_does_not_fit_is_refused_with_the_numbers():
    layer = Linear(random_weight(16, 64, 32))
    with pytest.raises(ValueError, match="x has 63 features, expected 64"):
        layer(torch.randn(3, 63))
    with pytest.raises(ValueError, match=r"out is float32\[3, 15\], expected float32\[3, 16\]"):
        layer(torch.randn(3, 64), out=torch.empty(3, 15))
    with pytest.raises(ValueError, match="act_bits is 5"):
        Linear(random_weight(16, 64, 32), act_bits=5)
    with pytest.raises(ValueError, match="bits is 5"):
        Linear.from_float(nn.Linear(64, 8), bits=5)


def test_only_floats_on_the_cpu_are_taken():
    layer = Linear(random_weight(16, 64, 32))
    for x in (torch.ones(3, 64, dtype=torch.int64), torch.empty(3, 64, device="meta")):  # a layer on the CPU
        with pytest.raises(ValueError, match="expected floats on the CPU"):
            layer(x)


def test_casting_the_module_leaves_the_weights_alone():
    layer, x = Linear(random_weight(16, 64, 32, mask="sparse", bias=True)), torch.randn(3, 64)
    expected = layer(x)
    nn.Sequential(layer).to(torch.bfloat16).half()
    assert torch.equal(layer(x), expected)


def weights() -> list[QTensor]:
    """One of each form."""
    return [
        random_weight(40, 96, 32, 4, True, "sparse", bias=True),
        random_weight(33, 37, 37, 8, mask="full_row", scale_f32=True),
        random_weight(17, 96, 32, columns=3),
        random_weight(20, 101, 101),
    ]


def same(a: QTensor, b: QTensor) -> bool:
    return a.tensors().keys() == b.tensors().keys() and all(torch.equal(t, b.tensors()[key]) for key, t in a.tensors().items())


@pytest.mark.parametrize("kernel", [row["name"] for row in _C.QLinear.kernels() if row["missing"] is None])
def test_a_layer_gives_back_the_weights_it_was_made_of(kernel):
    for w in weights():
        assert same(Linear(w, 8 if kernel == "qlinear_amx_int8" else 16, kernel).quantized(), w)


def test_a_state_dict_goes_through_a_file_into_a_layer_of_another_form(tmp_path):
    from safetensors.torch import load_file, save_file

    for w in weights():
        model, x = nn.Sequential(Linear(w)), torch.randn(3, w.k)
        state = model.state_dict()
        assert state.keys() == {f"0.{key}" for key in w.tensors()}
        save_file(state, tmp_path / "state.safetensors")
        other = nn.Sequential(Linear(random_weight(w.n, w.k, w.k)))
        other.load_state_dict(load_file(tmp_path / "state.safetensors"))
        assert torch.equal(other(x), model(x)) and repr(other) == repr(model)


def test_a_state_dict_that_does_not_fit_leaves_the_layer_as_it_was():
    layer, x = Linear(random_weight(16, 64, 32, mask="sparse")), torch.randn(3, 64)
    expected, state = layer(x), layer.state_dict()
    for change, why in (
        ({"weight": None}, "Missing key.* \"weight\""),
        ({"weight": state["weight"].float()}, "Linear.weight: dtype float32, expected uint8"),
        ({"scale": state["scale"] * torch.inf}, "Linear.scale: 32 values are NaN or infinite"),
        ({"outlier_col": None}, "outlier_row, outlier_col and outlier_value must exist together"),
        ({"gamma": torch.ones(1)}, "Unexpected key.* \"gamma\""),
        (Linear(random_weight(17, 64, 32)).state_dict(), r"shape \[17, 32\], expected \[16, 32\]"),
    ):
        changed = {key: t for key, t in (state | change).items() if t is not None}
        with pytest.raises(RuntimeError, match=why):
            layer.load_state_dict(changed)
        assert torch.equal(layer(x), expected)


def test_copies_are_independent_and_small():
    layer, x = Linear(random_weight(16, 64, 32, mask="sparse"), gated=True), torch.randn(3, 64)
    layer.register_buffer("note", torch.ones(1))
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    assert len(file.getvalue()) < 20_000
    file.seek(0)
    for other in (copy.copy(layer), copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected) and torch.equal(other.note, layer.note)
        other.load_state_dict(Linear(random_weight(16, 64, 64)).state_dict() | {"note": torch.ones(1)})
        assert torch.equal(layer(x), expected) and not torch.equal(other(x), expected)


def test_a_layer_without_values_takes_those_of_a_state_dict():
    layer, x = Linear(random_weight(16, 64, 32, mask="sparse", bias=True)), torch.randn(3, 64)
    expected, state = layer(x), layer.state_dict()
    layer.to("meta")
    assert layer.device.type == "meta" and all(t.is_meta for t in layer.state_dict().values())
    with pytest.raises(NotImplementedError, match="no data"):
        layer.cpu()
    with pytest.raises(ValueError, match="on meta and has no weights"):
        Linear.from_float(nn.Linear(64, 8, device="meta"))
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)
    layer.to("meta").to_empty(device="cpu")
    assert not layer(x).any()
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)
    with pytest.raises(RuntimeError, match="no kernels for mps"):
        layer._place(layer.quantized(), torch.device("mps"))


def test_a_group_that_does_not_divide_is_said():
    with pytest.warns(UserWarning, match="group size 128 does not divide 96 inputs: 96 is used"):
        Linear.from_float(nn.Linear(96, 8))


def test_threads_do_not_disturb_each_other():
    layers = [Linear(random_weight(64, 256, 32, mask="sparse")) for _ in range(2)]
    xs = [torch.randn(5, 256) for _ in range(4)]
    expected = [[layer(x) for x in xs] for layer in layers]
    wrong = []

    def work(start: int) -> None:
        for i in range(start, start + 400):
            a, b = i % 2, i * 7 % 4
            if not torch.equal(layers[a](xs[b]), expected[a][b]):
                wrong.append((a, b))

    from_threads(work)
    assert not wrong


def test_a_forked_process_has_threads_of_its_own():
    layer, x = Linear(random_weight(512, 256, 32)), torch.randn(64, 256)
    expected = layer(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_forked_while_another_thread_runs_does_not_wait_for_it():
    layer, x = Linear(random_weight(512, 512, 32)), torch.randn(64, 512)
    expected, done = layer(x), threading.Event()

    def work() -> None:
        while not done.is_set():
            layer(x)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # ends a child that waits
                os._exit(0 if torch.equal(layer(x), expected) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        thread.join()


def test_replace_linears_in_a_module():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Sequential(nn.Linear(128, 64)))
    model.add_module("lm_head", nn.Linear(64, 10))
    x = torch.randn(7, 64)
    before = model(x)
    assert replace_linears(model, bits=8, group_size=32, outliers=0.0) == ["0", "2.0"]
    assert isinstance(model[0], pyengine.Linear) and isinstance(model.lm_head, nn.Linear)
    assert (model(x) - before).norm() / before.norm() < 0.02


def test_replace_linears_in_a_transformers_model(stories):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    before = model(ids).logits
    assert len(replace_linears(model, bits=8, group_size=32)) == 5 * 7
    after = model(ids).logits
    assert (after - before).norm() / before.norm() < 0.05
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape == (1, 13)


def test_stacked_weights_give_the_same_bits():
    parts = [random_weight(n, 96, 32, mask=mask, bias=True) for n, mask in ((33, "sparse"), (16, "none"), (7, "full_row"))]
    whole = Linear(stack(parts).check())
    x = torch.randn(5, 96)
    assert torch.equal(whole(x), torch.cat([Linear(p)(x) for p in parts], 1))
    assert whole.outliers == sum(p.outliers for p in parts)


def test_stacked_columns():
    parts = [random_weight(n, 96, 32, mask=mask, columns=4) for n, mask in ((33, "sparse"), (16, "none"))]
    assert stack(parts) is None  # each has columns of its own
    mask = torch.zeros(33, 96, dtype=torch.bool).index_fill(1, torch.tensor([3, 8, 95]), True)
    parts = [quantize_matrix(torch.randn(n, 96), Spec(group_size=32, scope="columns"), mask[:n]) for n in (33, 16)]
    x = torch.randn(5, 96)
    assert torch.equal(Linear(stack(parts).check())(x), torch.cat([Linear(p)(x) for p in parts], 1))


def test_formats_that_differ_stand_side_by_side():
    parts = [random_weight(33, 96, 32, bits=4), random_weight(16, 96, 32, bits=8), random_weight(7, 96, 96)]
    assert stack(parts) is None
    layer = linear([*parts, (torch.randn(5, 96), None)])
    assert isinstance(layer, SideBySide) and layer.out_features == 61
    x, residual = torch.randn(4, 96), torch.randn(4, 61)
    expected = torch.cat([Linear(p)(x) for p in parts] + [layer.parts[3](x)], 1) + residual
    assert torch.allclose(layer(x, residual=residual), expected, atol=1e-5)
    layer(x, residual=residual, out=residual)
    assert torch.allclose(residual, expected, atol=1e-5)


def test_dense_and_embedding():
    w, b, x, residual = torch.randn(9, 8), torch.randn(9), torch.randn(3, 8), torch.randn(3, 9)
    expected = x @ w.T + b + residual
    assert torch.allclose(Dense(w, b)(x, residual=residual), expected, atol=1e-6)
    q = random_weight(50, 64, 32, bits=8, mask="sparse")
    token = torch.tensor([3, 3, 49])
    whole = random_weight(50, 64, 32, bits=8, mask="sparse", columns=4)
    for table, q in ((Linear(q), q), (q.dequantize(), q), (Linear(whole), whole), (Linear(whole, kernel="qlinear_reference"), whole)):
        assert torch.equal(Embedding(table)(token, torch.empty(3, 64)), q.dequantize()[token])


def test_gated_layers_agree():
    """One op, a plain layer with the op behind it where formats differ, and a float one."""
    parts = [random_weight(32, 64, 32, mask="sparse"), random_weight(32, 64, 64)]
    alike = [parts[0], random_weight(32, 64, 32)]
    for weights in (parts, alike, [(p.dequantize(), None) for p in parts]):
        layer, x = linear(weights, gated=True), torch.randn(3, 64)
        gate, up = ((w[0] if isinstance(w, tuple) else w.dequantize()).double() for w in weights)
        expected = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
        assert torch.allclose(layer(x).double(), expected, atol=1e-3 * expected.abs().max())
        out, program = torch.zeros(3, 32), ops.Program()
        if not isinstance(weights[0], tuple):
            layer(x, out=out, program=program)
            program.run()
            assert torch.equal(out, layer(x))
