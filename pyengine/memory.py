"""Tensors in large pages, which kernels read at up to twice the speed of small ones."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from . import _C

PAGE = 2 << 20
CHUNK = 64 << 20  # of address space; what is never touched takes no memory
ALIGNMENT = 64  # bytes: a cache line

_chunk = torch.empty(0, dtype=torch.uint8)  # what is left of the last one; tensors keep theirs alive
_turn = threading.Lock()  # two threads must not be given the same bytes


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialized tensor with a home of its own in large pages, if it fills at least one."""
    size = math.prod(shape) * dtype.itemsize
    if size < PAGE:
        return torch.empty(*shape, dtype=dtype)
    room = torch.empty(size + PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % PAGE
    _C.advise_large_pages(room.data_ptr(), room.numel())
    return room[start : start + size].view(dtype).view(*shape)


def together(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Uninitialized f32 tensors in one allocation: each alone may be too small for large pages."""
    sizes = [(math.prod(shape) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT for shape in shapes]
    return [part[: math.prod(shape)].view(shape) for part, shape in zip(empty(sum(sizes)).split(sizes), shapes)]


def packed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor that lies beside the last one: small weights of one model share their pages."""
    global _chunk
    size = (math.prod(shape) * dtype.itemsize + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    if not size:
        return torch.empty(shape, dtype=dtype)
    with _turn:
        if size > _chunk.numel():
            _chunk = empty(max(size, CHUNK), dtype=torch.uint8)
        taken, _chunk = _chunk[:size], _chunk[size:]
    # By numpy the tensor's storage ends where it does: who saves or copies a tensor takes its whole storage.
    return torch.from_numpy(taken[: math.prod(shape) * dtype.itemsize].numpy()).view(dtype).view(shape)


def pack(t: Tensor) -> Tensor:
    """A copy of a tensor beside the last one."""
    return packed(tuple(t.shape), t.dtype).copy_(t)


_workspace = torch.empty(0, dtype=torch.uint8)


def workspace(op) -> Tensor:
    """Points an op at scratch memory that all ops share, since they run one after another; keep what it returns as long as the op."""
    global _workspace
    size = op.workspace_bytes() + ALIGNMENT
    room = _workspace  # read once: another thread may put a smaller one in its place at any time
    if room.numel() < size:
        _workspace = room = empty(size, dtype=torch.uint8)
    op.workspace = (room.data_ptr() + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return room
