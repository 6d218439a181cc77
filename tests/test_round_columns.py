"""RoundColumns: the oracle against plain torch in float64, the vector kernels against the oracle bit for bit."""

from __future__ import annotations

import pytest
import torch
from test_kernels import rows

from pyengine import ops

SHAPES = ((1, 2, 1), (5, 16, 2), (32, 17, 17), (33, 50, 5), (70, 130, 10), (192, 576, 9))  # n, k, groups


def problem(n: int, k: int, groups: int, zero: bool, mask: bool, base: bool) -> dict:
    g = torch.Generator().manual_seed(n + k)
    kept = torch.rand(n, k, generator=g) < 0.1
    kept[0] = True  # a row that keeps everything
    return {
        "value": torch.randn(n, k, generator=g),
        "scale": (0.05 + torch.rand(n, groups, generator=g)) * torch.where(torch.rand(n, groups, generator=g) < 0.3, -1.0, 1.0),
        "zero": torch.randint(0, 16, (n, groups), generator=g).float() if zero else None,
        "group": (torch.randperm(k, generator=g) * groups // k).int(),
        "coupling": torch.randn(k, k, generator=g) / k,
        "limits": (0, 15) if zero else (-8, 7),
        "excess": 0 if zero else 8,
        "mask": kept if mask else None,
        "base": torch.randn(n, k, generator=g) if base else None,
    }


OPTIONS = [(False, False, False), (True, True, False), (False, True, True), (True, False, True)]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_oracle_is_what_the_op_says(options):
    for n, k, groups in SHAPES[:4]:
        p = problem(n, k, groups, *options)
        codes, values = ops.round_columns(**p, kernel="round_columns_reference")
        v, each = p["value"].double(), p["group"].long()
        for j in range(k):
            # Each column is rounded as the op has it, since a difference in the last digit may change a code; what follows is exact.
            assert torch.allclose(values[:, j].double(), v[:, j], atol=1e-4)
            x, s = values[:, j], p["scale"][:, each[j]]
            z = 0 if p["zero"] is None else p["zero"][:, each[j]]
            code = (torch.round(x / s) + z).clamp(*p["limits"])
            assert torch.equal(codes[:, j].float(), code + p["excess"])
            q = (code - z) * s
            if p["mask"] is not None:
                q = torch.where(p["mask"][:, j], x.half().float(), q)
            change = q - (x if p["base"] is None else p["base"][:, j])
            v[:, j + 1 :] += change.double().unsqueeze(1) * p["coupling"][j + 1 :, j].double()


@pytest.mark.parametrize("kernel", rows("RoundColumns"))
def test_kernels_give_the_bits_of_the_oracle(kernel):
    for n, k, groups in SHAPES:
        for options in OPTIONS:
            p = problem(n, k, groups, *options)
            if n == 70:  # codes of 8 bits
                p |= {"limits": (0, 255)} if options[0] else {"limits": (-128, 127), "excess": 128}
                p["scale"] = p["scale"] / 32
            expected = ops.round_columns(**p, kernel="round_columns_reference")
            found = ops.round_columns(**p, kernel=kernel)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), (n, k, groups, options)


def test_threads_do_not_matter():
    p, threads = problem(192, 576, 9, True, True, True), ops.threads()
    results = []
    try:
        for count in (1, 3):
            ops.set_threads(count)
            results.append(ops.round_columns(**p))
    finally:
        ops.set_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tensors_that_a_kernel_would_misread_are_refused():
    p = problem(5, 16, 2, False, True, True)
    for name, bad, message in (
        ("scale", p["scale"][:4], r"scale is float32\[4, 2\], expected float32\[5, 2\]"),
        ("mask", p["mask"].byte(), r"mask is uint8\[5, 16\], expected bool"),
        ("group", p["group"].long(), r"group is int64\[16\]"),
        ("group", p["group"] + 1, "group goes from 1 to 2, expected 0 to 1"),
        ("group", p["group"] - 1, "group goes from -1 to 0, expected 0 to 1"),
        ("coupling", p["coupling"][1:], r"coupling is float32\[15, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.round_columns(**p | {name: bad})
