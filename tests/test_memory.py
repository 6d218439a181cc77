"""Memory of several tensors in one piece: places of their own, aligned, alive as long as any of them, from any number of threads."""

from __future__ import annotations

import gc
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from pyengine import memory


def from_threads(work) -> None:
    """work(i) in four threads that change places between any two steps."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("size", (1, memory.PAGE - 4, memory.PAGE, 3 * memory.PAGE + 4))
def test_large_tensors_begin_a_page(size):
    t = memory.empty(size // 4, 4, dtype=torch.uint8)
    assert t.shape == (size // 4, 4) and t.is_contiguous()
    assert size // 4 * 4 < memory.PAGE or t.data_ptr() % memory.PAGE == 0
    assert t.untyped_storage().data_ptr() <= t.data_ptr() and t.data_ptr() + t.numel() <= t.untyped_storage().data_ptr() + t.untyped_storage().nbytes()


def test_packed_tensors_lie_side_by_side_and_outlive_each_other():
    tensors = [memory.packed((n, 3), torch.float16) for n in (1, 5, 32, 33, 1000, 7)]
    for i, t in enumerate(tensors):
        t.fill_(i)
    assert all(t.data_ptr() % memory.ALIGNMENT == 0 for t in tensors)
    for t, following in zip(tensors[1:], tensors[2:]):
        if t.data_ptr() < following.data_ptr():  # else a new piece was begun between them
            assert following.data_ptr() - t.data_ptr() < t.numel() * 2 + memory.ALIGNMENT
    assert all((t == i).all() for i, t in enumerate(tensors))
    copies = [t.clone() for t in tensors[3:]]
    memory._chunk = torch.empty(0, dtype=torch.uint8)
    del tensors[:3]
    gc.collect()
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies))


class Slow:
    """A piece of memory in whose slicing threads change places."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.numel = tensor, tensor.numel

    def __getitem__(self, part: slice):
        time.sleep(1e-5)
        taken = self.tensor[part]
        return Slow(taken) if part.stop is None else taken


def test_threads_are_never_given_the_same_bytes(monkeypatch):
    monkeypatch.setattr(memory, "_chunk", Slow(torch.empty(1 << 20, dtype=torch.uint8)))
    starts = []

    def work(i: int) -> None:
        for _ in range(200):
            starts.append(memory.packed((16,), torch.float32).data_ptr())

    from_threads(work)
    assert len(set(starts)) == len(starts) == 800


def test_a_workspace_is_as_large_as_asked_and_kept_while_others_ask():
    wrong = []

    def work(i: int) -> None:
        for j in range(3000):
            size = (i * 37 + j * 101) % 1000 * 64
            op = SimpleNamespace(workspace_bytes=lambda: size, workspace=0)
            if j % 10 == 0:
                memory._workspace = torch.empty(0, dtype=torch.uint8)  # so that it grows again and again
            kept = memory.workspace(op)
            start, end = kept.data_ptr(), kept.data_ptr() + kept.numel()
            if op.workspace % memory.ALIGNMENT or not start <= op.workspace <= op.workspace + size <= end:
                wrong.append((op.workspace, size, start, end))

    from_threads(work)
    assert not wrong
