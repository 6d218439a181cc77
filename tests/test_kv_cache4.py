"""The KV cache in 4 bits, and the change of basis before it: the oracle against torch, each kernel against the oracle."""

from __future__ import annotations

import pytest
import torch
from test_kernels import ROPE_ROWS, check_attention, error, rows

from pyengine import ops
from pyengine.cache import KVCache

HEADS, KV_HEADS, LENGTH = 6, 2, 40


def filled_cache(slots: int, kv_heads: int, length: int, head_dim: int) -> tuple:
    """(k, v, kv_scale) of random codes, whose scales differ as much as those of a model do."""
    k, v = (torch.randint(0, 256, (slots, kv_heads, length, head_dim // 2), dtype=torch.uint8) for _ in "kv")
    scale = [torch.rand(slots, kv_heads, length) * 0.3 + 0.01 for _ in "kv"]
    zero = [torch.randint(0, 16, (slots, kv_heads, length), dtype=torch.uint8) for _ in "kv"]
    return k, v, (*scale, *zero)


def dequantized(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    unpacked = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return (unpacked.double() - zero[..., None].double()) * scale[..., None].double()


def unwritten(kv_heads: int) -> tuple:
    """Scales and zeros of three slots, filled with what no kernel writes there."""
    shape = (3, kv_heads, LENGTH)
    return *(torch.full(shape, -1.0) for _ in "kv"), *(torch.full(shape, 99, dtype=torch.uint8) for _ in "kv")


def write(kernel: str, qkv: torch.Tensor, angle: torch.Tensor, head_dim: int, **options) -> tuple:
    """What a kernel makes of a fresh cache, and of q: one token for each of three slots and then the next three."""
    m = qkv.shape[0]
    k, v = (torch.full((3, KV_HEADS, LENGTH, head_dim // 2), 255, dtype=torch.uint8) for _ in "kv")
    kv_scale = unwritten(KV_HEADS)
    slot, position = torch.arange(m, dtype=torch.int32) % 3, torch.arange(m, dtype=torch.int32) // 3 + 5
    turned = qkv.clone()
    ops.rope_kv(turned, angle.cos(), angle.sin(), k, v, slot, position, HEADS, kv_scale=kv_scale, kernel=kernel, **options)
    return turned[:, : HEADS * head_dim], k, v, *kv_scale


def orthogonal(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n))[0].contiguous()


def test_the_oracle_writes_what_ops_h_says():
    head_dim, m = 16, 9
    angle, basis = torch.rand(LENGTH, head_dim // 2) * 6, (orthogonal(head_dim), orthogonal(head_dim))
    clip = torch.tensor([0.8, 0.6]), torch.tensor([1.0, 0.9])
    qkv = torch.randn(m, (HEADS + 2 * KV_HEADS) * head_dim) * torch.logspace(-6, 6, m)[:, None]
    qkv[:, (HEADS + KV_HEADS) * head_dim :] += 2  # values off the middle
    q, k, v, k_scale, v_scale, k_zero, v_zero = write("rope_kv_reference", qkv, angle, head_dim, basis=basis, clip=clip)
    slot, position = torch.arange(m) % 3, torch.arange(m) // 3 + 5
    head = qkv.view(m, -1, head_dim).double()
    turn = torch.polar(torch.ones(LENGTH, head_dim // 2).double(), angle.double())[position][:, None]
    turned = torch.complex(*head[:, : HEADS + KV_HEADS].chunk(2, -1)) * turn
    turned = torch.cat((turned.real, turned.imag), -1)
    assert error(q.view(m, HEADS, head_dim), turned[:, :HEADS] @ basis[0].double()) <= 1e-6
    for t, codes, scale, zero, (up, down) in (
        (turned[:, HEADS:] @ basis[1].double(), k, k_scale, k_zero, clip[0].tolist()), (head[:, HEADS + KV_HEADS :], v, v_scale, v_zero, clip[1].tolist())
    ):  # fmt: skip
        high, low = up * t.amax(-1).clamp(min=0), down * t.amin(-1).clamp(max=0)
        step = (high - low) / 15
        assert torch.allclose(scale[slot, :, position].double(), step, rtol=1e-5)
        wanted = (-low / step).round()
        assert (zero[slot, :, position] == wanted).float().mean() > 0.9 and zero[slot, :, position].max() <= 15  # ties apart
        expected = ((t / step[..., None]).round() + wanted[..., None]).clamp(0, 15)
        unpacked = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[slot, :, position]
        assert (unpacked == expected).float().mean() > 0.97
    assert (k[:, :, :5] == 255).all() and (k[:, :, 8:] == 255).all() and (v_zero[:, :, 8:] == 99).all()


@pytest.mark.parametrize("head_dim", (2, 8, 20, 36, 64, 80, 128, 256))
@pytest.mark.parametrize("kernel", ROPE_ROWS)
def test_written_codes_are_the_oracles_bit_by_bit(kernel, head_dim):
    """Numbers of few digits, turned by quarters and put in another order: nothing but the quantizer can differ."""
    m, at = 12, HEADS * head_dim
    angle = torch.randint(0, 4, (LENGTH, head_dim // 2)) * (torch.pi / 2)
    qkv = torch.randint(-8000, 8001, (m, at + 2 * KV_HEADS * head_dim)) / 64
    head = qkv[:, at:].view(m, 2, KV_HEADS, head_dim)
    head[2, :, 0] = 0
    head[3, :, 0, -1], head[4, :, 1, 0], head[5, 1, 0, head_dim // 2] = torch.nan, torch.inf, -torch.inf
    head[6] *= 2.0**-140
    head[7] = head[7].abs() + 5  # nothing below zero
    cos, sin = angle.cos().round(), angle.sin().round()
    order = (torch.eye(head_dim)[torch.randperm(head_dim)] * (torch.randint(0, 2, (head_dim,)) * 2 - 1)).contiguous()
    for options in ({}, {"basis": (order, order.T.contiguous()), "clip": (torch.tensor([0.9, 0.8]), torch.tensor([0.5, 1.0]))}):
        results = []
        for name in (kernel, "rope_kv_reference"):
            k, v = (torch.full((3, KV_HEADS, LENGTH, head_dim // 2), 255, dtype=torch.uint8) for _ in "kv")
            scale = unwritten(KV_HEADS)
            slot, position, turned = torch.arange(m, dtype=torch.int32) % 3, torch.arange(m, dtype=torch.int32) // 3 + 5, qkv.clone()
            ops.rope_kv(turned, cos, sin, k, v, slot, position, HEADS, kv_scale=scale, kernel=name, **options)
            results.append((turned[:, :at], k, v, *scale))
        assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(*results))
        assert torch.isnan(results[0][3]).sum() == 2 and torch.isnan(results[0][4]).sum() == 3


@pytest.mark.parametrize("bits", (16, 8))
@pytest.mark.parametrize("kernel", ROPE_ROWS)
def test_a_change_of_basis_before_wider_caches(kernel, bits):
    head_dim, m = 64, 7
    cache = KVCache(1, 2, KV_HEADS, LENGTH, head_dim, bits).layer(0)
    angle, basis = torch.rand(LENGTH, head_dim // 2) * 6, (torch.randn(head_dim, head_dim), torch.randn(head_dim, head_dim))
    where, qkv, results = torch.zeros(m, dtype=torch.int32), torch.randn(m, (HEADS + 2 * KV_HEADS) * head_dim), []
    for name in (kernel, "rope_kv_reference"):
        turned = qkv.clone()
        position = torch.arange(m, dtype=torch.int32)
        ops.rope_kv(turned, angle.cos(), angle.sin(), cache.k, cache.v, where, position, HEADS, kv_scale=cache.scale, basis=basis, kernel=name)
        k = cache.k[0, :, :m].double() * (1 if bits == 16 else cache.scale[0][0, :, :m, None])
        results.append((turned[:, : HEADS * head_dim], k))
    assert error(results[0][0], results[1][0]) <= 1e-6 and error(results[0][1], results[1][1]) <= 1e-3


def test_the_oracle_of_attention_matches_torch():
    k, v, kv_scale = filled_cache(1, 2, 20, 16)
    q, at = torch.randn(20, 4 * 16), torch.arange(20, dtype=torch.int32)
    y = ops.attention(q, k, v, torch.zeros(20, dtype=torch.int32), at, 0.25, kv_scale=kv_scale, kernel="attention_reference")
    keys, values = dequantized(k, kv_scale[0], kv_scale[2])[0], dequantized(v, kv_scale[1], kv_scale[3])[0]
    q = q.view(20, 4, 16).transpose(0, 1).double()
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=0.25, enable_gqa=True)
    assert error(y, expected.transpose(0, 1).reshape(20, 64)) <= 1e-6


@pytest.mark.parametrize("head_dim", (2, 8, 36, 64, 80, 96, 128, 256))
@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (9, 3), (8, 1)))
@pytest.mark.parametrize("kernel", rows("Attention"))
def test_attention_matches_the_oracle(kernel, heads, kv_heads, head_dim):
    k, v, kv_scale = filled_cache(3, kv_heads, 600, head_dim)
    for scale in kv_scale[:2]:
        scale[:, :, 590:] = torch.nan  # positions that nobody has reached
    check_attention(kernel, k, v, heads, head_dim, kv_scale)


@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("kernel", ["attention_reference", *rows("Attention")])
def test_a_broken_key_or_value_shows_in_what_sees_it(kernel, which):
    k, v, kv_scale = filled_cache(2, 1, 400, 64)
    kv_scale[which][0, 0, 300] = torch.nan
    position = torch.arange(280, 310, dtype=torch.int32)
    for slot in (0, 1):
        y = ops.attention(torch.randn(30, 64), k, v, torch.full_like(position, slot), position, 0.1, kv_scale=kv_scale, kernel=kernel)
        assert torch.isnan(y[position >= 300]).all() if slot == 0 else torch.isfinite(y).all()


def test_a_cache_that_a_kernel_would_misread_is_refused():
    k, v, scale = filled_cache(2, 1, 40, 64)
    q, slot = torch.randn(1, 64), torch.zeros(1, dtype=torch.int32)
    for cache, parts, why in (
        ((k, v), scale[:2], "k cache is uint8"),
        ((k, v), None, "k cache is uint8"),
        ((k.view(torch.int8), v), scale, "k cache is int8"),
        ((k, v), (*scale[:3], scale[3].float()), "v zero is float32"),
        ((k, v), (*scale[:3], torch.ones(2, 1, 80, dtype=torch.uint8)[:, :, :40]), "v zero must be laid out as the cache"),
    ):
        with pytest.raises(ValueError, match=why):
            ops.attention(q, *cache, slot, slot, 1.0, kv_scale=parts)


def test_the_cache_takes_29_percent_of_the_memory():
    whole, cache = KVCache(2, 3, 4, 100, 64), KVCache(2, 3, 4, 100, 64, bits=4)
    assert cache.nbytes / whole.nbytes == (32 + 4 + 1) / 128
    tensors = (*cache.layer(1)[:2], *cache.layer(1).scale)
    for i, t in enumerate(tensors):
        t.fill_(i)
    assert [t.unique().tolist() for t in tensors] == [[i] for i in range(6)] and cache.layer(0).k.shape == (3, 4, 100, 32)  # nothing overlaps
