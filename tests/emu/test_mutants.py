"""Kernels with one bug each: the emulator must catch every one of them, and must say nothing about the kernels without a bug."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

RNG = np.random.default_rng(0)


@dataclass
class Family:
    """A kernel, how to run it once (returns whether the numbers are right) and what its bugs are."""

    name: str
    run: Callable
    bugs: dict[int, str]
    arch: int = 80
    on_gpu: bool = True
    found: dict[int, set[str]] = field(default_factory=dict)


def call(device, name: str, bug: int, *arguments) -> int:
    return getattr(device.library, name)(bug, *(ctypes.c_void_p(a.ptr) if hasattr(a, "ptr") else a for a in arguments), ctypes.c_void_p(device.stream))


def close(got: np.ndarray, expected: np.ndarray, bound: float = 1e-5) -> bool:
    return bool(np.abs(got - expected).max() <= bound * np.abs(expected).max())  # false for NaN too


def block_sum(device, bug: int) -> bool:
    x = RNG.standard_normal((3, 200)).astype(np.float32)
    xs, out = device.array(x, "x"), device.empty(3, np.float32, "out")
    call(device, "run_block_sum", bug, xs, out, 3, 200)
    return close(out.numpy(), x.astype(np.float64).sum(1))


def reverse_twice(device, bug: int) -> bool:
    x = RNG.standard_normal(128).astype(np.float32)
    xs, ys = device.array(x, "x"), device.empty(128, np.float32, "y")
    call(device, "run_reverse_twice", bug, xs, ys, 2, 0)
    return close(ys.numpy(), x + 1)


def producer_consumer(device, bug: int) -> bool:
    x = RNG.standard_normal((5, 64)).astype(np.float32)
    xs, ys = device.array(x, "x"), device.empty(64, np.float32, "y")
    call(device, "run_producer_consumer", bug, xs, ys, 0, 5)
    return close(ys.numpy(), x.sum(0)[::-1])


def gemm_tile(device, bug: int) -> bool:
    m, k = 21, 160
    a, b = (RNG.standard_normal((rows, k)).astype(np.float16) for rows in (m, 64))
    a_, b_, d = device.array(a, "a"), device.array(b, "b"), device.empty((m, 64), np.float32, "d")
    call(device, "run_gemm_tile", bug, a_, b_, d, m, k)
    return close(d.numpy(), a.astype(np.float64) @ b.astype(np.float64).T)


def sum_over_blocks(device, bug: int) -> bool:
    x = RNG.standard_normal((6, 64)).astype(np.float32)
    xs, part, y = device.array(x, "x"), device.empty((6, 64), np.float32, "part"), device.empty(64, np.float32, "y")
    counter = device.array(np.zeros(1, np.uint32), "counter", read_only=False)
    call(device, "run_sum_over_blocks", bug, xs, part, counter, y, 6)
    return close(y.numpy(), 2 * x.astype(np.float64).sum(0))


def chain(device, bug: int) -> bool:
    x = RNG.standard_normal(4).astype(np.float32)
    xs, y = device.array(x, "x"), device.empty(1, np.float32, "y")
    flag = device.array(np.zeros(1, np.uint32), "flag", read_only=False)
    call(device, "run_chain", bug, xs, y, flag, 4)
    return close(y.numpy(), x.astype(np.float64).sum(keepdims=True))


FAMILIES = [
    Family("block_sum", block_sum, {
        1: "loop goes one too far", 2: "last step of a shuffle left out", 3: "mask of half a warp", 4: "index shifted past an array", 5: "barrier in divergent code",
        6: "no barrier before others' parts are read", 7: "input overwritten"}),
    Family("reverse_twice", reverse_twice, {1: "no __syncwarp before a read", 2: "no __syncwarp before an overwrite", 3: "__syncwarp of the wrong lanes"}),
    Family("producer_consumer", producer_consumer, {1: "producer does not wait for empty", 2: "barrier count off", 3: "consumer does not wait for full", 4: "empty never signalled"}),
    Family("gemm_tile", gemm_tile, {
        1: "no barrier after the copies", 2: "no barrier before the ring is overwritten", 3: "wait count off on the last stage", 4: "tail not zero-filled", 5: "tail stored",
        6: "asm operands swapped", 7: "one lane's ldmatrix address off", 8: "ldmatrix transposed", 9: "64 bytes too little shared memory", 10: "k index shifted",
        11: "copy size wrong at the tail", 12: "B registers swapped", 13: "grid rounded down", 14: "grid of no blocks", 15: "block larger than compiled for",
        16: "more than 48 KiB not asked for", 17: "launched on another stream"}),
    Family("sum_over_blocks", sum_over_blocks, {
        1: "no fence before the counter", 2: "fence of block scope", 3: "no fence after the counter", 4: "last block off by one", 5: "no barrier after the flag"}),
    Family("chain", chain, {1: "polls for a value that never comes", 2: "no fence before the flag"}),
]  # fmt: skip


def observe(device, family: Family, bug: int) -> tuple[int, dict[str, int]]:
    """Runs it in all schedules: how often, and how often each kind of check, or a wrong number, saw it."""
    seen: dict[str, int] = {}
    runs = 0
    for order, seed, workers, resident in (("in_order", 1, 2, 4), ("reverse", 1, 2, 4), ("greedy", 1, 1, 8), ("random", 1, 1, 8), ("random", 2, 1, 8), ("random", 3, 2, 4)):
        device.reset()
        device.schedule(order, seed, workers, resident)
        right = family.run(device, bug)
        kinds = {r.split(":")[0] for r in device.reports()} | (set() if right else {"numbers"})
        runs += 1
        for kind in kinds:
            seen[kind] = seen.get(kind, 0) + 1
    return runs, seen


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_without_a_bug_nothing_is_reported(kernel_device, family):
    if family.arch > kernel_device.arch:
        pytest.skip("needs compute capability 9.0")
    assert observe(kernel_device, family, 0)[1] == {}


@pytest.mark.parametrize("family, bug", [pytest.param(f, b, id=f"{f.name}-{text.replace(' ', '_')}") for f in FAMILIES for b, text in f.bugs.items()])
def test_the_bug_is_caught_in_every_schedule(kernel_device, family, bug):
    if not kernel_device.emulated:
        pytest.skip("a GPU may crash on it, or hide it")
    if family.arch > kernel_device.arch:
        pytest.skip("needs compute capability 9.0")
    runs, seen = observe(kernel_device, family, bug)
    print(f"{family.name:18} {family.bugs[bug]:44} " + ", ".join(f"{k} {n}/{runs}" for k, n in sorted(seen.items())))
    assert max(seen.values(), default=0) == runs, f"survives some schedules: {seen}"
