"""INT8 matrix units give the bits of the vector kernel that takes fewer tokens: nothing shows where a batch crosses from one to the other."""

from __future__ import annotations

import pytest
import torch
from test_kernels import rows
from weights import random_weight

from pyengine import _C
from pyengine.linear import Linear

pytestmark = [mark for row in rows("QLinear") if row.values[0] == "qlinear_amx_int8" for mark in row.marks]
# (n, k, group): minimal, odd, no multiple of any tile, groups of half a tile, a row in one group that takes several parts.
SHAPES = ((1, 32, 32), (17, 64, 64), (33, 96, 32), (35, 37, 37), (50, 100, 100), (64, 256, 128), (48, 1500, 1500), (32, 640, 640), (32, 1344, 64))


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("mask", ("none", "sparse", "one_tile"))
def test_it_has_the_bits_of_the_vector_kernel(bits, mask):
    for n, k, group in SHAPES:
        for act_bits, asymmetric in ((8, False), (8, True), (4, True)):
            w = random_weight(n, k, group, bits, asymmetric, mask, bias=asymmetric, scale_f32=n == 33, columns=3 if asymmetric else 0)
            clip = torch.tensor([0.9, 0.8]) if asymmetric else None
            layer, vector = (Linear(w, act_bits, name, act_clip=clip) for name in ("qlinear_amx_int8", "qlinear_avx512"))
            x, residual = torch.randn(300, k + 5)[:, 2 : k + 2], torch.randn(300, n)
            expected = vector(x, residual=residual)
            for m in (16, 17, 31, 33, 256, 300):
                assert torch.equal(layer(x[:m], residual=residual[:m]), expected[:m]), (n, k, group, act_bits, asymmetric, m)


@pytest.mark.parametrize("mask", ("none", "sparse"))
def test_a_gated_result_too(mask):
    """Without outliers it never leaves the tiles; with them it does."""
    for n, k, group in ((32, 64, 64), (96, 100, 100), (160, 256, 32)):
        w = random_weight(n, k, group, 4, True, mask, bias=True, columns=2)
        layer, vector = (Linear(w, 8, name, gated=True) for name in ("qlinear_amx_int8", "qlinear_avx512"))
        x = torch.randn(270, k)
        expected = vector(x)
        for m in (16, 19, 270):
            assert torch.equal(layer(x[:m]), expected[:m]), (n, k, m)


@pytest.mark.parametrize("group", (128, 13056))
def test_inputs_that_are_too_many_for_a_slab(group):
    for asymmetric in (False, True):
        w = random_weight(33, 13056, group, 4, asymmetric, bias=True)
        layer, vector = (Linear(w, 8, name) for name in ("qlinear_amx_int8", "qlinear_avx512"))
        x = torch.randn(70, w.k)
        assert torch.equal(layer(x), vector(x))


def test_the_longest_group_is_exact():
    """Codes and activations at their ends, over as many inputs as an int32 holds sums of."""
    w = random_weight(16, 1 << 16, 1 << 16, 8)
    w.weight.fill_(0)
    w.scale = torch.ones(16, 1)
    y = Linear(w, 8, "qlinear_amx_int8")(torch.full((16, w.k), 127.0))
    assert (y == -128 * 127 * w.k).all()


def test_an_unchosen_thread_count_changes_nothing():
    layer, x, before = Linear(random_weight(100, 576, 576), 4, "qlinear_amx_int8"), torch.randn(70, 576), _C.threads()
    whole = layer(x)
    try:
        for count in (1, 3):
            _C.set_threads(count)
            assert torch.equal(layer(x), whole)
    finally:
        _C.set_threads(before)
