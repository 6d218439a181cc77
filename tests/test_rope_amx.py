"""RoPE with a change of basis on matrix units: exact where bf16 is, within its bound elsewhere, and the same for a token in any batch."""

from __future__ import annotations

import pytest
import torch
from test_kernels import error, rows

from pyengine import _C, ops
from pyengine.cache import KVCache

pytestmark = [mark for row in rows("RopeKV") if row.values[0] == "rope_kv_amx" for mark in row.marks]
HEADS, KV_HEADS, LENGTH, BATCHES = 7, 2, 40, (16, 17, 31, 64, 70)  # more heads than are turned at once, and no multiple of them

KERNELS = ("rope_kv_amx", "rope_kv_reference")


def write(kernel: str, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bits: int, **options) -> tuple:
    """What a kernel makes of q, and of a fresh cache: a token for each of three slots, then the next three."""
    m, head_dim = qkv.shape[0], qkv.shape[1] // (HEADS + 2 * KV_HEADS)
    cache = KVCache(1, 3, KV_HEADS, LENGTH, head_dim, bits).layer(0)
    slot, position = torch.arange(m, dtype=torch.int32) % 3, torch.arange(m, dtype=torch.int32) // 3 + 5
    wide = torch.zeros(m, qkv.shape[1] + 5)
    wide[:, 2 : qkv.shape[1] + 2] = qkv
    turned = wide[:, 2 : qkv.shape[1] + 2]
    ops.rope_kv(turned, cos, sin, cache.k, cache.v, slot, position, HEADS, kv_scale=cache.scale, kernel=kernel, **options)
    assert not wide[:, :2].any() and not wide[:, -3:].any()
    where = slot.long(), slice(None), position.long()
    return turned[:, : HEADS * head_dim], *(t[where] for t in (cache.k, cache.v, *(cache.scale or ())))


@pytest.mark.parametrize("bits", (16, 8, 4))
@pytest.mark.parametrize("head_dim", (32, 64, 96, 128))
def test_few_digits_in_another_order_are_the_oracles_bit_by_bit(head_dim, bits):
    angle = torch.randint(0, 4, (LENGTH, head_dim // 2)) * (torch.pi / 2)
    order = (torch.eye(head_dim)[torch.randperm(head_dim)] * (torch.randint(0, 2, (head_dim,)) * 2 - 1)).contiguous()
    options = {"basis": (order, order.T.contiguous()), "clip": (torch.tensor([0.9, 0.8]), torch.tensor([0.5, 1.0]))}
    qkv = torch.randint(-100, 101, (max(BATCHES), (HEADS + 2 * KV_HEADS) * head_dim)) / 64
    qkv[3, -1], qkv[4, (HEADS + KV_HEADS) * head_dim - 1], qkv[5, 0] = torch.nan, torch.inf, torch.nan  # of v, k and q
    for m in BATCHES:
        got, expected = (write(name, qkv[:m], angle.cos().round(), angle.sin().round(), bits, **options) for name in KERNELS)
        assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(got, expected)), m
        assert torch.isnan(got[0][5, :head_dim]).all() and torch.isfinite(got[0][torch.arange(m) != 5]).all()


@pytest.mark.parametrize("head_dim", (32, 64, 96, 128))
def test_any_basis_is_within_the_bound(head_dim):
    angle, basis = torch.rand(LENGTH, head_dim // 2) * 6, tuple(torch.randn(head_dim, head_dim) / head_dim**0.5 for _ in "qk")
    qkv = torch.randn(max(BATCHES), (HEADS + 2 * KV_HEADS) * head_dim)
    for m in BATCHES:
        got, expected = (write(name, qkv[:m], angle.cos(), angle.sin(), 16, basis=basis) for name in KERNELS)
        assert error(got[0], expected[0]) <= 1e-2 and error(got[1], expected[1]) <= 1e-2 and torch.equal(got[2], expected[2])


def test_a_token_has_the_same_bits_in_any_batch_and_on_any_number_of_threads():
    angle, basis = torch.rand(LENGTH, 32) * 6, (torch.randn(64, 64), torch.randn(64, 64))
    qkv, before = torch.randn(max(BATCHES), (HEADS + 2 * KV_HEADS) * 64), _C.threads()
    whole = write("rope_kv_amx", qkv, angle.cos(), angle.sin(), 4, basis=basis)
    try:
        for count in (1, 3):
            _C.set_threads(count)
            for m in BATCHES:
                some = write("rope_kv_amx", qkv[:m], angle.cos(), angle.sin(), 4, basis=basis)
                assert all(torch.equal(a, b[:m]) for a, b in zip(some, whole))
    finally:
        _C.set_threads(before)


def test_it_says_what_it_is_not_for():
    op = _C.RopeKV()
    for op.m, op.head_dim, op.exact, op.q_transform, why in (
        (16, 64, True, 64, "bf16"), (16, 64, False, 0, "nothing to multiply"), (16, 80, False, 64, "multiple of 32"), (16, 160, False, 64, "above 128"),
        (15, 64, False, 64, "fewer than 16 rows"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=why):
            op.choose("rope_kv_amx")
