"""Attention over a cache of 16, 8 and 4 bits on CUDA, and RoPE with a change of basis that writes it, against float64: on the emulated GPUs,
and with `-m gpu` on a real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

DTYPES = {torch.float16: 1, torch.bfloat16: 2}
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # the rounding of a value
SLOTS = 3


def put(device, t: torch.Tensor, name: str, read_only: bool = True):
    return device.array(t.contiguous().view(torch.uint8).numpy() if t.dtype == torch.bfloat16 else t.contiguous().numpy(), name, read_only)


def get(array, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array.numpy().copy()).view(like.dtype).view(like.shape)


class Cache:
    """Keys and values [slot, head, length, d] as they lie in a cache of `bits`, with all the codes there are."""

    def __init__(self, bits: int, heads: int, length: int, d: int):
        self.bits, self.shape, self.parts = bits, (SLOTS, heads, length, d), {}
        for name in "kv":
            if bits == 16:
                self.parts[name] = torch.randn(self.shape).half()
                continue
            least, most, size = (-127, 128, d) if bits == 8 else (0, 256, d // 2)
            codes = torch.randint(least, most, (*self.shape[:3], size), dtype=torch.int8 if bits == 8 else torch.uint8)
            self.parts |= {name: codes, f"{name}_scale": torch.rand(self.shape[:3]) * (2 / 127 if bits == 8 else 0.3) + 1e-4}
            if bits == 4:
                self.parts[f"{name}_zero"] = torch.randint(0, 16, self.shape[:3], dtype=torch.uint8)

    def place(self, device, read_only: bool = True):
        """The op's struct, and the arrays by name."""
        cache, (_, heads, length, d) = device.ops.KVCache(), self.shape
        arrays = {name: put(device, t, name, read_only) for name, t in self.parts.items()}
        for name, array in arrays.items():
            setattr(cache, name, array.ptr)
        cache.bits, cache.slot_stride, cache.head_stride = self.bits, heads * length * d, length * d
        return cache, arrays

    def values(self, name: str) -> torch.Tensor:
        codes = self.parts[name].double()
        if self.bits == 4:
            codes = torch.stack((self.parts[name] & 15, self.parts[name] >> 4), 4).view(self.shape).double()
            codes -= self.parts[f"{name}_zero"][..., None].double()
        return codes if self.bits == 16 else codes * self.parts[f"{name}_scale"][..., None].double()


def attention(device, cache: Cache, q: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """q [m, heads, d] → y, whose rows lie 8 values apart."""
    (m, heads, d), op = q.shape, device.ops.Attention()
    op.cache, _ = cache.place(device)
    op.m, op.heads, op.kv_heads, op.head_dim, op.dtype, op.scale = m, heads, cache.shape[1], d, DTYPES[q.dtype], d**-0.5
    op.q_stride, op.y_stride = heads * d, heads * d + 8
    y = put(device, torch.full((m, op.y_stride), 7, dtype=q.dtype), "y", read_only=False)
    op.q, op.slot, op.position, op.y = put(device, q, "q").ptr, put(device, slot, "slot").ptr, put(device, position, "position").ptr, y.ptr
    size = op.workspace_bytes()
    op.workspace = device.array(np.zeros(size, np.uint8), "workspace", read_only=False).ptr if size else 0
    op.run(stream=device.stream, kernel="attention_sm80")
    found = get(y, torch.empty(m, op.y_stride, dtype=q.dtype))
    assert (found[:, heads * d :] == 7).all(), "wrote beyond its heads"
    return found[:, : heads * d].view(q.shape)


def expected_attention(cache: Cache, q: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    k, v = cache.values("k"), cache.values("v")
    share = q.shape[1] // k.shape[1]
    y = torch.empty(q.shape, dtype=torch.float64)
    for i, (s, last) in enumerate(zip(slot.tolist(), position.tolist())):
        keys, values = (t[s, :, : last + 1].repeat_interleave(share, 0) for t in (k, v))
        p = torch.softmax((keys @ q[i].double()[:, :, None])[..., 0] * q.shape[2] ** -0.5, 1)
        y[i] = (p[:, None] @ values)[:, 0]
    return y


# (query heads, key heads, head_dim, length, positions)
PROBLEMS = ((4, 4, 64, 80, (0, 79)), (9, 3, 64, 300, (15, 16, 299)), (14, 2, 128, 200, (199,)))
# So many rows that each has one block, which takes step after step.
PROBLEMS += ((8, 8, 64, 210, (*range(200, 210), 0, 63, 64, 127, 128, 150, *range(190, 207))),)
PROBLEMS += ((20, 1, 16, 70, (64, 3, 63)), (2, 1, 80, 100, (99, 50)), (8, 8, 104, 64, (31,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", (16, 8, 4))
def test_attention(device, bits, dtype):
    for i, (heads, kv_heads, d, length, positions) in enumerate(PROBLEMS):
        device.reset()
        device.schedule(("in_order", "reverse", "greedy", "random")[i % 4], i, 1 + i % 2, 1 + i % 3)
        cache, position = Cache(bits, kv_heads, length, d), torch.tensor(positions, dtype=torch.int32)
        slot, q = torch.arange(len(positions), dtype=torch.int32) % SLOTS, (torch.randn(len(positions), heads, d) * 2).to(dtype)
        y, expected = attention(device, cache, q, slot, position).double(), expected_attention(cache, q, slot, position)
        assert (y - expected).norm() <= (2e-3 + UNIT[dtype]) * expected.norm(), PROBLEMS[i]
        device.check()


@pytest.mark.parametrize("bits", (16, 4))
def test_attention_of_every_schedule_has_the_same_bits(device, bits):
    """Blocks share the keys here, and their shares are added in one order whoever comes last."""
    cache, q = Cache(bits, 2, 520, 64), torch.randn(2, 6, 64).half()
    slot, position = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([519, 130], dtype=torch.int32)
    found = [attention(device, cache, q, slot, position) for _ in device.schedules(seeds=1)]
    assert all(torch.equal(y, found[0]) for y in found)
    assert (found[0].double() - expected_attention(cache, q, slot, position)).abs().max() < 5e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", (16, 8, 4))
def test_rope_with_a_change_of_basis(device, bits, dtype):
    """Every row's q, and its keys and values as the cache stands for them: within half a step, and whole where a head is not finite."""
    for heads, kv_heads, d, based in ((5, 2, 64, True), (9, 3, 128, True), (4, 4, 24, False)):
        m, length = 4, 12
        cos, sin = torch.randn(length, d // 2), torch.randn(length, d // 2)
        qkv = torch.randn(m, (heads + 2 * kv_heads) * d + 8).to(dtype)
        qkv[2, heads * d + 1] = torch.nan
        bases = {name: torch.linalg.qr(torch.randn(d, d))[0].half() if based else None for name in ("q_transform", "k_transform")}
        clips = {"k_clip": torch.tensor([0.9, 0.95]), "v_clip": torch.tensor([1.0, 0.8])}
        slot, position = torch.arange(m, dtype=torch.int32) % SLOTS, torch.arange(m, dtype=torch.int32) + 5
        rows = qkv[:, :-8].double().view(m, -1, d)
        a, b, co, si = rows[..., : d // 2], rows[..., d // 2 :], cos[position.long()][:, None].double(), sin[position.long()][:, None].double()
        turned = torch.cat((a * co - b * si, b * co + a * si), 2)
        q, k, v = turned[:, :heads], turned[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]
        if based:
            q, k = q @ bases["q_transform"].double(), k @ bases["k_transform"].double()
        for schedule in device.schedules(seeds=1):
            cache = Cache(bits, kv_heads, length, d)
            op, written = device.ops.RopeKV(), put(device, qkv, "qkv", read_only=False)
            op.cache, arrays = cache.place(device, read_only=False)
            op.m, op.heads, op.kv_heads, op.head_dim, op.dtype = m, heads, kv_heads, d, DTYPES[dtype]
            op.qkv_stride, op.qkv = qkv.stride(0), written.ptr
            for name, t in {"cos": cos, "sin": sin, "slot": slot, "position": position, **bases, **clips}.items():
                if t is not None:
                    setattr(op, name, put(device, t, name).ptr)
            op.run(stream=device.stream, kernel="rope_kv_codes_sm80")
            now = get(written, qkv)
            assert ((now[:, : heads * d].double().view(q.shape) - q).abs() <= UNIT[dtype] * q.abs() + 1e-5).all(), schedule
            assert torch.equal(now[:, heads * d :].nan_to_num(), qkv[:, heads * d :].nan_to_num()), schedule
            before, cache.parts = cache.parts, {name: get(arrays[name], t) for name, t in cache.parts.items()}
            where, others = (slot.long(), slice(None), position.long()), torch.ones(SLOTS, length, dtype=torch.bool)
            others[slot.long(), position.long()] = False
            assert all(torch.equal(before[n].transpose(1, 2)[others], cache.parts[n].transpose(1, 2)[others]) for n in before), schedule
            check_cached(cache, where, {"k": k, "v": v}, clips)


def check_cached(cache: Cache, where: tuple, wanted: dict[str, torch.Tensor], clips: dict[str, torch.Tensor]) -> None:
    """The keys and values that were written: [m, kv_heads, d]."""
    for name, x in wanted.items():
        found, finite = cache.values(name)[where], x.isfinite().all(2)
        if cache.bits == 16:
            assert ((found - x).abs() <= 2.0**-11 * x.abs() + 1e-5)[finite].all()
            continue
        scale = cache.parts[f"{name}_scale"][where]
        assert scale[~finite].isnan().all() and scale[finite].isfinite().all()
        high, low = x.clamp(min=0).amax(2), x.clamp(max=0).amin(2)
        if cache.bits == 8:
            expected = torch.maximum(high, -low) / 127
        else:
            high, low = high * clips[f"{name}_clip"][0], low * clips[f"{name}_clip"][1]
            expected = (high - low) / 15
            step = expected[..., None]  # the zero code is rounded too
            x = torch.minimum(torch.maximum(x, low[..., None] - step / 2), high[..., None] + step / 2)
        assert torch.allclose(scale[finite].double(), expected[finite], rtol=1e-5)
        steps = 0.501 if cache.bits == 8 else 1.001
        assert ((found - x).abs() <= steps * expected[..., None])[finite].all()
