"""The small CUDA kernels between the linears, forced by name, against float64: on the emulated GPUs, and with `-m gpu` on a real one."""

from __future__ import annotations

import pytest
import torch
from test_cuda_qlinear import Problem
from weights import random_weight

DTYPES = {torch.float16: 1, torch.bfloat16: 2}
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # the rounding of a value; ops.h


def put(device, t: torch.Tensor, name: str, read_only: bool = True):
    return device.array(t.contiguous().view(torch.uint8).numpy() if t.dtype == torch.bfloat16 else t.contiguous().numpy(), name, read_only)


def get(array, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array.numpy().copy()).view(like.dtype).view(like.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(device, dtype):
    for m, n in ((1, 8), (3, 576), (2, 2048 + 8)):
        x = (torch.randn(m, 2 * n) * 10).to(dtype)
        x[0, 0], x[-1, n - 1] = 200.0, -200.0  # far outside of what exp() can return
        expected = torch.nn.functional.silu(x.double()[:, :n]) * x.double()[:, n:]
        for schedule in device.schedules(seeds=1):
            xs, ys = put(device, x, "x"), put(device, x[:, :n] * 0 + 7, "y", read_only=False)
            op = device.ops.SiluMul()
            op.m, op.n, op.dtype, op.x, op.y = m, n, DTYPES[dtype], xs.ptr, ys.ptr
            op.run(stream=device.stream, kernel="silu_mul_sm80")
            y = get(ys, x[:, :n]).double()
            assert ((y - expected).abs() <= (UNIT[dtype] + 1e-6) * expected.abs() + 1e-7).all(), (m, n, schedule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (16, 64, 128, 272))
def test_rope_kv(device, dtype, head_dim):
    heads, kv_heads, length, m, half = 5, 2, 40, 6, head_dim // 2
    cos, sin = torch.randn(length, half), torch.randn(length, half)
    qkv = torch.randn(m, (heads + 2 * kv_heads) * head_dim + 8).to(dtype)
    k, v = (torch.randn(3, kv_heads, length, head_dim).half() for _ in range(2))
    slot, position = torch.arange(m, dtype=torch.int32) % 3, torch.arange(m, dtype=torch.int32) + 5
    rows = qkv[:, :-8].double().view(m, -1, head_dim)
    a, b, co, si = rows[..., :half], rows[..., half:], cos[position.long()][:, None].double(), sin[position.long()][:, None].double()
    turned = torch.cat((a * co - b * si, b * co + a * si), 2)
    for schedule in device.schedules(seeds=1):
        arrays = {name: put(device, t, name) for name, t in (("cos", cos), ("sin", sin), ("slot", slot), ("position", position))}
        written = {name: put(device, t, name, read_only=False) for name, t in (("qkv", qkv), ("k", k), ("v", v))}
        op, cache = device.ops.RopeKV(), device.ops.KVCache()
        op.m, op.heads, op.kv_heads, op.head_dim, op.dtype, op.qkv_stride = m, heads, kv_heads, head_dim, DTYPES[dtype], qkv.stride(0)
        for name, array in (arrays | {"qkv": written["qkv"]}).items():
            setattr(op, name, array.ptr)
        cache.k, cache.v, cache.slot_stride, cache.head_stride = written["k"].ptr, written["v"].ptr, k.stride(0), k.stride(1)
        op.cache = cache
        op.run(stream=device.stream, kernel="rope_kv_sm80")
        now, cached_k, cached_v = get(written["qkv"], qkv), get(written["k"], k), get(written["v"], v)
        q = now[:, : heads * head_dim].double().view(m, heads, head_dim)
        assert ((q - turned[:, :heads]).abs() <= UNIT[dtype] * turned[:, :heads].abs() + 1e-5).all(), schedule
        assert torch.equal(now[:, heads * head_dim :], qkv[:, heads * head_dim :]), schedule
        where, others = (slot.long(), slice(None), position.long()), torch.ones(3, length, dtype=torch.bool)
        others[slot.long(), position.long()] = False
        wanted = turned[:, heads : heads + kv_heads]
        assert ((cached_k[where].double() - wanted).abs() <= 2.0**-11 * wanted.abs() + 1e-5).all(), schedule
        assert torch.equal(cached_v[where], rows[:, heads + kv_heads :].half()), schedule
        for old, new in ((k, cached_k), (v, cached_v)):
            assert torch.equal(old.transpose(1, 2)[others], new.transpose(1, 2)[others]), schedule


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", (4, 8))
def test_embedding(device, dtype, bits):
    """Bit for bit the dequantized rows, and NaN for tokens that the table does not have."""
    shapes = ((17, 64, 32, "none"), (130, 1104, 1104, "sparse"), (70, 37, 37, "full_row"), (100, 4096 + 96, 32, "sparse"), (65, 128, 64, "dense"))
    for case, (n, k, group, mask) in enumerate(shapes):
        problem = Problem(device, random_weight(n, k, group, bits, case % 2 == 1, mask, scale_f32=case % 3 == 1))
        expected = torch.cat((problem.w.dequantize().to(dtype), torch.full((2, k), torch.nan, dtype=dtype)))
        token = torch.cat((torch.randint(0, n, (9,)), torch.tensor([0, n // 2, n - 1, -1, n])))
        for schedule in device.schedules(seeds=1):
            problem.place(1)
            op, y = device.ops.Embedding(), put(device, torch.zeros(len(token), k, dtype=dtype), "y", read_only=False)
            op.m, op.table, op.dtype, op.token, op.y = len(token), problem.op, DTYPES[dtype], put(device, token, "token").ptr, y.ptr
            op.run(stream=device.stream, kernel="embedding_sm80")
            found, wanted = get(y, torch.zeros(len(token), k, dtype=dtype)), expected[token]
            assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num()), (case, schedule)
