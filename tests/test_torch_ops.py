"""`pyengine::linear`, the op that torch sees of a Linear: compiled, exported, faked, mapped and differentiated."""

from __future__ import annotations

import io
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from weights import random_weight

from pyengine.linear import Linear
from pyengine.torch_ops import arguments

BACKEND = "inductor" if shutil.which("g++") else "aot_eager"
OP = torch.ops.pyengine.linear


def layers() -> list[Linear]:
    """One of each form, packed in each layout that runs here."""
    return [
        Linear(random_weight(40, 96, 32, 4, True, "sparse", bias=True)),
        Linear(random_weight(40, 96, 96, 8, scale_f32=True), act_bits=8),
        Linear(random_weight(40, 96, 32, columns=3), gated=True),
        Linear(random_weight(33, 64, 64, mask="full_row"), kernel="qlinear_reference"),
    ]


def stacked(count: int = 3) -> nn.Sequential:
    return nn.Sequential(*(Linear(random_weight(64, 64, 32, mask="sparse", bias=i == 1)) for i in range(count)))


def test_the_op_is_the_layer():
    for layer in layers():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 3, layer.in_features).to(dtype)
            y, out = layer(x), torch.empty(6, layer.out_features)
            assert torch.equal(OP(x, *arguments(layer)), y)
            OP.out(x, *arguments(layer), out=out)
            assert torch.equal(out.view_as(y).to(dtype), y)


def test_torch_finds_the_op_well_behaved():
    for layer in layers():
        x = torch.randn(2, 3, layer.in_features)
        torch.library.opcheck(OP.default, (x, *arguments(layer)))
    torch.library.opcheck(OP.out, (x, *arguments(layer)), {"out": torch.empty(6, layer.out_features)})


def test_compiled_layers_give_the_same_bits_for_any_batch_without_compiling_for_each():
    model, counter = stacked(), CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for m in (4, 5, 6, 9, 17, 40):
        x = torch.randn(m, 64)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 2  # for 4 rows, then for any number


def test_layers_of_one_form_share_what_is_compiled():
    counter = CompileCounterWithBackend("aot_eager")
    for layer in (Linear(random_weight(64, 64, 32)) for _ in range(4)):
        compiled, x = torch.compile(layer, fullgraph=True, backend=counter), torch.randn(3, 64)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_compiled_code_follows_a_layer_that_gets_other_weights():
    layer, x = Linear(random_weight(64, 64, 32)), torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    layer.load_state_dict(Linear(random_weight(64, 64, 32, 8, mask="sparse")).state_dict())
    assert torch.equal(compiled(x), layer(x)) and not torch.equal(compiled(x), before)


def test_an_exported_program_comes_back_from_its_file():
    model, file = stacked(), io.BytesIO()
    program = torch.export.export(model, (torch.randn(4, 64),), dynamic_shapes=({0: torch.export.Dim("m", min=1, max=512)},))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.export.save(program, file)
    packed = sum(t.nbytes for t in model.buffers())
    assert len(file.getvalue()) < packed + 100_000  # its weights, and not the memory beside them
    file.seek(0)
    back = torch.export.load(file).module()
    for m in (1, 7, 300):
        x = torch.randn(m, 64)
        assert torch.equal(back(x), model(x))


def test_shapes_without_values():
    model = stacked()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = model(torch.empty(2, 3, 64, dtype=torch.bfloat16))
    assert y.shape == (2, 3, 64) and y.dtype == torch.bfloat16
    meta = model.to("meta")(torch.empty(5, 64, device="meta"))
    assert meta.is_meta and meta.shape == (5, 64)
    with pytest.raises(ValueError, match="x has 63 features, expected 64"):
        model(torch.empty(5, 63, device="meta"))
    with pytest.raises(ValueError, match="x is float32 on cpu, expected floats on meta"):
        model(torch.empty(5, 64))


def test_vmap():
    layer, x = layers()[0], torch.randn(5, 3, 96)
    assert torch.equal(torch.func.vmap(layer)(x), layer(x))
    assert torch.equal(torch.func.vmap(layer, in_dims=1, out_dims=1)(x), layer(x))


def test_a_gradient_is_refused_when_it_is_asked_for_and_not_before():
    layer, x = layers()[0], torch.randn(3, 96, requires_grad=True)
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = function(x)
        assert y.requires_grad and torch.equal(y.detach(), layer(x.detach()))
        with pytest.raises(RuntimeError, match="pyengine.Linear has no backward pass"):
            y.sum().backward()
    with torch.no_grad():
        assert not layer(x).requires_grad
    with pytest.raises(ValueError, match="with `out` torch can neither trace a residual nor differentiate"):
        layer(x, out=torch.empty(3, 40))


def test_a_mode_that_watches_ops_sees_this_one():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    seen: list = []
    with Watch():
        layers()[0](torch.randn(3, 96))
    assert OP.default in seen
