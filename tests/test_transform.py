"""The op Transform: change of basis of what linears read, with RMSNorm or a gate before it and the quantizer after it."""

from __future__ import annotations

import pytest
import torch
from test_kernels import error, rows
from weights import random_weight

from pyengine import _C, ops
from pyengine.linear import Linear

# (a, b): those of SmolLM2-135M, a mix of heads, no multiple of anything, either factor alone, a long one.
SHAPES = ((24, 24), (32, 48), (9, 64), (1, 1), (5, 7), (1, 37), (37, 1), (112, 128), (28, 33), (256, 16))


def factors(a: int, b: int, which: str) -> dict[str, torch.Tensor]:
    made = {"left": torch.randn(a, a) / a**0.5, "right": torch.randn(b, b) / b**0.5}
    return {name: t for name, t in made.items() if name[0] in which}


def expected(x: torch.Tensor, a: int, b: int, left=None, right=None, weight=None, eps=0.0, gated=False) -> torch.Tensor:
    v = x.double()
    if gated:
        v = torch.nn.functional.silu(v[:, : a * b]) * v[:, a * b :]
    if weight is not None:
        v = torch.nn.functional.rms_norm(v, (a * b,), weight.double(), eps)
    t = v.view(-1, a, b)
    t = t if right is None else t @ right.double()
    return (t if left is None else left.double().T @ t).flatten(1)


def takes(kernel: str, m: int, a: int = 1, b: int = 1, which: str = "lr") -> bool:
    return kernel != "transform_amx" or (m >= 16 and max(a, b) <= 128 and which != "")


@pytest.mark.parametrize("which", ("lr", "l", "r", ""))
@pytest.mark.parametrize("kernel", ["transform_reference", *rows("Transform")])
def test_transform_matches_torch_in_float64(kernel, which):
    for a, b in SHAPES:
        n, f = a * b, factors(a, b, which)
        x, wide = torch.randn(19, n + 3), torch.randn(19, 2 * n)
        weight = torch.randn(n)
        for m in (1, 2, 7, 19):
            for inputs, options in ((x[:m, 1 : n + 1], {}), (x[:m, :n], {"weight": weight, "eps": 1e-3}), (wide[:m], {"gated": True})):
                if not takes(kernel, m, a, b, which):
                    continue
                y = ops.transform(inputs, a, b, **f, **options, kernel=kernel)
                limit = 1e-2 if kernel == "transform_amx" else 1e-5
                assert error(y, expected(inputs, a, b, **f, **options)) <= limit, (a, b, m, options.keys())


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("clip", (None, (0.7, 0.9), (1.0, 0.2)))
def test_codes_are_those_that_a_linear_makes_of_the_same_input(bits, clip):
    """And the oracle of QLinear takes them in place of its own."""
    a, b = 6, 16
    f, clip = factors(a, b, "lr"), None if clip is None else torch.tensor(clip)
    x = torch.randn(7, a * b) * torch.logspace(-5, 5, 7)[:, None]
    t, code, scale = torch.empty(7, a * b), torch.empty(7, a * b * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8), torch.empty(7)
    ops.transform(x, a, b, **f, out=t, codes=(code, scale), bits=bits, clip=clip)
    alone = torch.empty_like(code), torch.empty_like(scale)
    assert ops.transform(x, a, b, **f, codes=alone, bits=bits, clip=clip) is None
    assert torch.equal(alone[0], code) and torch.equal(alone[1], scale)

    q, (high, low) = (1 << (bits - 1)) - 1, (1.0, 1.0) if clip is None else clip
    assert torch.equal(scale, torch.maximum(high * t.amax(1), low * (-t).amax(1)) / q)
    wanted = (t * (1 / scale)[:, None]).round().clamp(-q - 1, q).to(torch.int8)
    unpacked = code if bits == 8 else torch.stack(((code << 4).view(torch.int8) >> 4, code.view(torch.int8) >> 4), 2).flatten(1)
    assert torch.equal(unpacked, wanted)

    layer = Linear(random_weight(20, a * b, 32, mask="sparse"), bits, "qlinear_reference", act_clip=clip)
    op, y = _C.QLinear(layer._op), torch.empty(7, 20)
    op.m, op.x, op.x_stride, op.y, op.y_stride = 7, t.data_ptr(), a * b, y.data_ptr(), 20
    op.x_code, op.x_scale = code.data_ptr(), scale.data_ptr()
    op.run()
    assert torch.equal(y, layer(t))
    code.zero_()
    op.run()
    assert not torch.equal(y, layer(t))  # the codes it was given, not x's own


@pytest.mark.parametrize("kernel", ["transform_reference", *rows("Transform")])
def test_a_token_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(kernel):
    f, x, before = factors(24, 24, "lr"), torch.randn(70, 576), ops.threads()
    whole = ops.transform(x, 24, 24, **f, kernel=kernel)
    try:
        for count in (1, 3):
            _C.set_threads(count)
            for m in (1, 2, 15, 16, 70):
                assert not takes(kernel, m) or torch.equal(ops.transform(x[:m], 24, 24, **f, kernel=kernel), whole[:m]), (count, m)
    finally:
        _C.set_threads(before)


@pytest.mark.parametrize("kernel", ["transform_reference", *rows("Transform")])
def test_a_broken_token_shows_and_its_neighbours_stay(kernel):
    x = torch.randn(20, 576)
    x[3, 100] = torch.nan
    y = ops.transform(x, 24, 24, **factors(24, 24, "lr"), kernel=kernel)
    assert torch.isnan(y[3]).all() and torch.isfinite(y[torch.arange(20) != 3]).all()
    code, scale = torch.empty(20, 576, dtype=torch.int8), torch.empty(20)
    ops.transform(x, 24, 24, codes=(code, scale))
    assert torch.isnan(scale[3]) and not code[3].any()


def test_matrix_units_say_what_they_are_not_for():
    if "transform_amx" not in [row.values[0] for row in rows("Transform") if not row.marks or not row.marks[0].args[0]]:
        pytest.skip("this machine has no AMX")
    x, eye = torch.randn(16, 64), torch.eye(64)
    for tokens, options, why in ((15, {"right": eye}, "fewer than 16 tokens"), (16, {}, "nothing to multiply"), (16, {"right": eye, "exact": True}, "bf16")):
        with pytest.raises(RuntimeError, match=why):
            ops.transform(x[:tokens], 1, 64, **options, kernel="transform_amx")


def test_what_a_kernel_would_misread_is_refused():
    x = torch.randn(3, 12)
    for options, why in (
        ({"a": 3, "b": 3}, r"x is float32\[3, 12\], expected float32\[3, 9\]"),
        ({"a": 3, "b": 4, "left": torch.eye(4)}, r"left is float32\[4, 4\]"),
        ({"a": 3, "b": 4, "right": torch.eye(4).half()}, "right is float16"),
        ({"a": 3, "b": 4, "gated": True, "weight": torch.ones(12)}, "exclude each other"),
        ({"a": 300, "b": 4}, "factors of 300 and 4"),
        ({"a": 3, "b": 4, "codes": (torch.empty(3, 12), torch.empty(3))}, "codes is float32"),
        ({"a": 3, "b": 4, "bits": 5, "codes": (torch.empty(3, 12, dtype=torch.int8), torch.empty(3))}, "codes of 5 bits"),
    ):
        with pytest.raises(ValueError, match=why):
            ops.transform(x, options.pop("a"), options.pop("b"), **options)
