"""Kernels keep to their memory: a workspace ends at a guard, every other tensor where a page begins that may not be touched."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os

import pytest
import torch
from test_kernels import bound, error, kv, rows, takes
from weights import random_weight

from pyengine import memory, ops
from pyengine.linear import Linear

GUARDS = []


def guarded(op) -> torch.Tensor:
    """In place of memory.workspace: not a byte more than asked for, and a guard behind them."""
    size, guard = op.workspace_bytes(), 1 << 16
    room = torch.full((size + guard + 64,), 0x7F, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    op.workspace = room.data_ptr() + start
    GUARDS.append(room[start + size :])
    return room


@pytest.fixture
def guards(monkeypatch):
    monkeypatch.setattr(memory, "workspace", guarded)
    yield
    untouched = [bool((g == 0x7F).all()) for g in GUARDS]
    GUARDS.clear()
    assert untouched and all(untouched)


@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_a_linear_stays_within_its_workspace(kernel, guards):
    """The tokens that fill a chunk, with inputs from fewer than any tile on."""
    act_bits = 8 if kernel == "qlinear_amx_int8" else 16
    for n, k, group in ((1, 2, 2), (32, 7, 7), (32, 8, 8), (3, 33, 33), (64, 320, 32)):
        for gated in (False, True):
            if gated and n % 32:
                continue
            w = random_weight(n, k, group, 4, True, "sparse", columns=k // 2)
            layer, oracle = (Linear(w, act_bits, name, gated) for name in (kernel, "qlinear_reference"))
            for m in (1, 15, 16, 255, 256, 512, 530):
                x = torch.randn(m, k)
                assert not takes(kernel, m, act_bits) or error(layer(x), oracle(x)) <= 10 * bound(kernel), (n, k, m, gated)


@pytest.mark.parametrize("kernel", rows("Attention"))
def test_attention_stays_within_its_workspace(kernel, guards):
    for share in (1, 4, 5, 16):
        k, v = kv(2, 2, 513, 32)
        for m in (1, 15) if kernel != "attention_amx" else (16,):
            slot, position = torch.ones(m, dtype=torch.int32), torch.full((m,), 512, dtype=torch.int32)
            q = torch.randn(m, 2 * share * 32)
            y, expected = (ops.attention(q, k, v, slot, position, 0.2, kernel=name) for name in (kernel, "attention_reference"))
            assert error(y, expected) <= (1e-2 if kernel == "attention_amx" else 1e-5), (share, m)


class Mapped:
    """Pages of memory, the last of which may not be touched."""

    def __init__(self, size: int):
        self.pages = mmap.mmap(-1, (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE)
        last = ctypes.addressof(ctypes.c_char.from_buffer(self.pages)) + len(self.pages) - mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(last), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0


def at_the_edge(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """In place of memory.packed: a tensor whose last byte is the last of a page, before one that may not be touched."""
    count = torch.Size(shape).numel()
    mapped = Mapped(count * dtype.itemsize)
    if not count:
        return torch.empty(shape, dtype=dtype)
    start = len(mapped.pages) - mmap.PAGESIZE - count * dtype.itemsize
    return torch.frombuffer(mapped.pages, dtype=dtype, count=count, offset=start).view(shape)


def moved(t: torch.Tensor) -> torch.Tensor:
    return at_the_edge(tuple(t.shape), t.dtype).copy_(t)


def survives(work) -> bool:
    """Whether a child process does `work` without touching what it must not."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # which would print what is expected
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_the_edge_is_one():
    t = at_the_edge((3,), torch.float32)
    assert survives(lambda: ctypes.memset(t.data_ptr(), 0, 12))
    assert not survives(lambda: ctypes.memset(t.data_ptr(), 0, 13))


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_a_linear_stays_within_its_tensors(kernel, bits, monkeypatch):
    monkeypatch.setattr(memory, "packed", at_the_edge)
    runs = []
    for n, k, group, mask in ((1, 2, 2, "dense"), (17, 37, 37, "full_row"), (35, 96, 32, "last_corner"), (33, 65, 65, "sparse"), (129, 64, 32, "one_tile")):
        for act_bits in (16, 8):
            layer = Linear(random_weight(n, k, group, bits, True, mask, bias=True, columns=2), act_bits, kernel) if takes(kernel, act_bits=act_bits) else None
            for m in (1, 3, 16, 19):
                if layer and takes(kernel, m, act_bits):
                    runs.append((layer, moved(torch.randn(m, k)), moved(torch.randn(m, n))))
    assert runs and survives(lambda: [layer(x, residual=y, out=y) for layer, x, y in runs])


@pytest.mark.parametrize("kernel", rows("Attention"))
def test_attention_stays_within_the_cache(kernel):
    runs = []
    for head_dim in (2, 36, 64, 80):
        for length in (1, 17, 33, 130):
            k, v = (moved(t) for t in kv(1, 1, length, head_dim))
            for m in (1, 5, 16, 20):
                if kernel == "attention_amx" and (m < 16 or head_dim % 32):
                    continue
                position = torch.arange(m, dtype=torch.int32).clamp(max=length - 1) + max(length - m, 0)
                q, y = moved(torch.randn(m, 3 * head_dim)), at_the_edge((m, 3 * head_dim), torch.float32)
                runs.append((q, k, v, moved(torch.zeros_like(position)), moved(position), y))
    work = lambda: [ops.attention(q, k, v, slot, position, 1.0, out=y, kernel=kernel) for q, k, v, slot, position, y in runs]  # noqa: E731
    assert runs and survives(work)
