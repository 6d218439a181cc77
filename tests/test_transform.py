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


def room(m: int, n: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For codes and scales, filled with what no kernel writes."""
    return torch.full((m, n * bits // 8), 77, dtype=torch.int8 if bits == 8 else torch.uint8), torch.full((m,), -1.0)


def unpacked(code: torch.Tensor, bits: int) -> torch.Tensor:
    return code if bits == 8 else torch.stack(((code << 4).view(torch.int8) >> 4, code.view(torch.int8) >> 4), 2).flatten(1)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("which", ("lr", "l", "r", ""))
@pytest.mark.parametrize("kernel", ["transform_reference", *rows("Transform")])
def test_codes_are_those_of_the_result(kernel, which, bits):
    """Rows of whole vectors, of parts of one, of an odd number of codes; alone and beside the result, which they are exact for."""
    q = (1 << (bits - 1)) - 1
    shapes, ratios = ((6, 16), (24, 24), (32, 48), (4, 7), (14, 5), (2, 100), (1, 2)), ((1, 1), (0.7, 0.9), (1, 0.2), (0.5, 0.5)) * 2
    for (a, b), (high, low) in zip(shapes, ratios):
        n, f, clip = a * b, factors(a, b, which), None if high == low == 1 else torch.tensor([high, low])
        for m in (1, 7, 19):
            if not takes(kernel, m, a, b, which):
                continue
            x = torch.randn(m, n + 3)[:, 2 : n + 2] * torch.logspace(-5, 5, m)[:, None]
            t, beside, alone = torch.empty(m, n), room(m, n, bits), room(m + 1, n, bits)
            options = {**f, "bits": bits, "clip": clip, "kernel": kernel}
            ops.transform(x, a, b, **options, out=t, codes=beside)
            assert ops.transform(x, a, b, **options, codes=(alone[0][:m], alone[1][:m])) is None
            assert torch.equal(alone[0][:m], beside[0]) and torch.equal(alone[1][:m], beside[1])
            assert (alone[0][m] == 77).all() and alone[1][m] == -1
            assert torch.equal(beside[1], torch.maximum(high * t.amax(1).clamp(min=0), low * (-t).amax(1).clamp(min=0)) / q)
            assert torch.equal(unpacked(beside[0], bits), (t * (1 / beside[1])[:, None]).round().clamp(-q - 1, q).to(torch.int8)), (a, b, m)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("mask", ("none", "sparse"))
@pytest.mark.parametrize("kernel", ["qlinear_reference", *(row for row in rows("QLinear") if row.values[0] != "qlinear_amx")])
def test_a_linear_takes_codes_in_place_of_its_own(kernel, mask, bits):
    clip = torch.tensor([0.9, 0.8])
    for n, k, group in ((20, 96, 32), (33, 70, 70), (64, 1600, 1600), (40, 200, 200)):
        x = torch.randn(530, k)
        w = random_weight(n, k, group, 4, n == 20, mask, columns=2 if mask == "sparse" else 0)
        layer, (code, scale) = Linear(w, bits, kernel, act_clip=clip), room(530, k, bits)
        ops.transform(x, 2 if k < 512 else 10, k // (2 if k < 512 else 10), codes=(code, scale), bits=bits, clip=clip)
        for m in (19, 530 if n == 33 else 17):
            given = code[:m], scale[:m]
            assert torch.equal(layer(x[:m], codes=given), layer(x[:m]))
            if mask == "none":
                assert torch.equal(layer(torch.full((m, k), torch.nan), codes=given), layer(x[:m]))
        scale[5] = 0
        assert mask == "sparse" or (layer(x[:19], codes=(code[:19], scale[:19]))[5] == 0).all()  # those it was given, not x's own
    with pytest.raises(ValueError, match="Linear: codes is"):
        layer(x, codes=(code[:5], scale))


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
    x[3, 10] = torch.nan
    for a, b in ((24, 24), (9, 64)):
        y = ops.transform(x, a, b, **factors(a, b, "lr"), kernel=kernel)
        assert torch.isnan(y[3]).all() and torch.isfinite(y[torch.arange(20) != 3]).all()
    for which in ("lr", "", "r"):
        code, scale = torch.empty(20, 576, dtype=torch.int8), torch.empty(20)
        if takes(kernel, 20, which=which):
            ops.transform(x, 24, 24, **factors(24, 24, which), codes=(code, scale), kernel=kernel)
            assert torch.isnan(scale[3]) and not code[3].any() and torch.isfinite(scale[torch.arange(20) != 3]).all()


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
