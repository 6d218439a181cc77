"""Kernels with one bug each: the emulator must catch every one of them, and must say nothing about the kernels without a bug."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

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


def tma_ring(device, bug: int) -> bool:
    x = RNG.standard_normal((37, 64)).astype(np.float32)
    xs, ys = device.array(x, "x"), device.empty(x.shape, np.float32, "y")
    call(device, "run_tma_ring", bug, xs, ys, 37)
    return close(ys.numpy(), x + 1)


def wgmma_tile(device, bug: int) -> bool:
    a, b = (RNG.standard_normal((rows, 16)).astype(np.float16) for rows in (64, 8))
    a_, b_, d = device.array(a, "a"), device.array(b, "b"), device.empty((64, 8), np.float32, "d")
    call(device, "run_wgmma_tile", bug, a_, b_, d)
    return close(d.numpy(), 2 * a.astype(np.float64) @ b.astype(np.float64).T)


def int8_ring(device, bug: int) -> bool:
    a, b = (RNG.integers(-128, 128, (5, rows, 32), dtype=np.int8) for rows in (64, 8))
    pieces = b.reshape(5, 8, 2, 16).transpose(0, 2, 1, 3)  # of a step [half of the inputs][row]
    a_, b_, d = device.array(a, "a"), device.array(pieces, "b"), device.empty((64, 8), np.int32, "d")
    call(device, "run_int8_ring", bug, a_, b_, d, 5)
    return np.array_equal(d.numpy(), np.einsum("smk,snk->mn", a.astype(np.int32), b.astype(np.int32)))


def cluster_exchange(device, bug: int) -> bool:
    x = RNG.standard_normal((3, 2, 64)).astype(np.float32)
    xs, ys = device.array(x, "x"), device.empty(x.shape, np.float32, "y")
    call(device, "run_cluster_exchange", bug, xs, ys, 6)
    return close(ys.numpy(), 2 * x[:, ::-1, ::-1])


def multicast(device, bug: int) -> bool:
    x = RNG.standard_normal((3, 1, 64)).astype(np.float32)
    xs, ys = device.array(x, "x"), device.empty((3, 2, 64), np.float32, "y")
    call(device, "run_multicast", bug, xs, ys, 6)
    return close(ys.numpy(), np.repeat(x, 2, 1))


def overlapping_grids(device, bug: int) -> bool:
    x = RNG.standard_normal(64).astype(np.float32)
    xs, between, ys = device.array(x, "x"), device.empty(128, np.float32, "between"), device.empty(64, np.float32, "y")
    call(device, "run_overlapping_grids", bug, xs, between, ys, ctypes.c_void_p(device.new_stream()))
    return close(ys.numpy(), 2 * (x + 1))


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
    Family("tma_ring", tma_ring, {
        1: "no fence after mbarrier.init", 2: "bytes expected off", 3: "consumer does not wait for full", 4: "producer does not wait for empty", 5: "coordinates swapped",
        6: "no fence.proxy.async before the store", 7: "wrong parity", 8: "arrival count off", 9: "no barrier after mbarrier.init", 10: "destination not aligned to 128",
        11: "store not waited for before the end", 12: "buffer reused while it is stored"}, 90),
    Family("wgmma_tile", wgmma_tile, {
        1: "no fence.proxy.async after the stores", 2: "no barrier after the stores", 3: "no wgmma.fence", 4: "descriptor stride off", 5: "accumulator thrown away",
        6: "operand overwritten before the wait", 7: "accumulator read before the wait", 8: "wait count off", 9: "accumulator written after the fence"}, 90),
    Family("int8_ring", int8_ring, {
        1: "data not waited for", 2: "one warp gives the stage back for all", 3: "no wgmma.fence", 4: "stage given back while it is read",
        5: "no __syncwarp before it is given back", 6: "operand registers swapped", 7: "last group not waited for"}, 90),
    Family("cluster_exchange", cluster_exchange, {
        1: "no barrier before the peer's memory is read", 2: "block ends while its memory is read", 3: "rank of the peer wrong", 4: "barrier without release",
        5: "barrier of the block instead of the cluster", 6: "grid no multiple of the cluster"}, 90),
    Family("multicast", multicast, {1: "mask lacks a block", 2: "bytes not expected", 3: "peer's mbarrier not known to be ready", 4: "data not waited for"}, 90),
    Family("overlapping_grids", overlapping_grids, {1: "no griddepcontrol.wait", 2: "read before griddepcontrol.wait", 3: "writes before griddepcontrol.wait", 4: "second grid in another stream"}, 90),
]  # fmt: skip


def observe(device, family: Family, bug: int) -> tuple[int, int, dict[str, int]]:
    """Runs it in all schedules: how often, how often something was found, and how often by each kind of check or a wrong number."""
    seen: dict[str, int] = {}
    runs = caught = 0
    for order, seed, workers, resident in (("in_order", 1, 2, 4), ("reverse", 1, 2, 4), ("greedy", 1, 1, 8), ("random", 1, 1, 8), ("random", 2, 1, 8), ("random", 3, 2, 4)):
        device.reset()
        device.schedule(order, seed, workers, resident)
        right = family.run(device, bug)
        kinds = {r.split(":")[0] for r in device.reports()} | (set() if right else {"numbers"})
        runs += 1
        caught += bool(kinds)
        for kind in kinds:
            seen[kind] = seen.get(kind, 0) + 1
    return runs, caught, seen


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_without_a_bug_nothing_is_reported(kernel_device, family):
    if family.arch > kernel_device.arch:
        pytest.skip("needs compute capability 9.0")
    assert observe(kernel_device, family, 0)[2] == {}


@pytest.mark.parametrize("family, bug", [pytest.param(f, b, id=f"{f.name}-{text.replace(' ', '_')}") for f in FAMILIES for b, text in f.bugs.items()])
def test_the_bug_is_caught_in_every_schedule(kernel_device, family, bug):
    if not kernel_device.emulated:
        pytest.skip("a GPU may crash on it, or hide it")
    if family.arch > kernel_device.arch:
        pytest.skip("needs compute capability 9.0")
    runs, caught, seen = observe(kernel_device, family, bug)
    print(f"{family.name:18} {family.bugs[bug]:44} " + ", ".join(f"{k} {n}/{runs}" for k, n in sorted(seen.items())))
    assert caught == runs, f"survives {runs - caught} of {runs} schedules: {seen}"


@pytest.mark.parametrize("rank", (1, 2, 3, 4, 5))
@pytest.mark.parametrize("start", (-3, 0, 4))
def test_tensor_copies(kernel_device, rank, start):
    """Boxes that hang over the edges of a tensor are filled with zeros on the way in and cut off on the way out."""
    if kernel_device.arch < 90:
        pytest.skip("needs compute capability 9.0")
    size, box = (20, 7, 5, 4, 3)[:rank], (8, 4, 3, 2, 2)[:rank]
    x = RNG.standard_normal(size[::-1]).astype(np.float32)
    for _ in kernel_device.schedules(seeds=1):
        xs, ys = kernel_device.array(x, "x"), kernel_device.array(np.zeros_like(x), "y", read_only=False)
        assert call(kernel_device, "run_copy_box", rank, xs, ys, start) == 0, kernel_device.reports()
        expected = np.zeros_like(x)
        inside = tuple(slice(max(start, 0), max(start + b, 0)) for b in box[::-1])
        expected[inside] = x[inside]
        assert np.array_equal(ys.numpy(), expected)


def test_multicast_of_a_tensor_box(kernel_device):
    if kernel_device.arch < 90:
        pytest.skip("needs compute capability 9.0")
    x = RNG.standard_normal((3, 1, 64)).astype(np.float32)
    for _ in kernel_device.schedules(seeds=1):
        xs, ys = kernel_device.array(x, "x"), kernel_device.empty((3, 2, 64), np.float32, "y")
        arguments = (ctypes.c_void_p(xs.ptr), ctypes.c_void_p(ys.ptr), 6, ctypes.c_void_p(kernel_device.stream))
        assert kernel_device.library.run_multicast_box(*arguments) == 0, kernel_device.reports()
        assert np.array_equal(ys.numpy(), np.repeat(x, 2, 1))
