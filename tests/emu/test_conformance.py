"""Every opcode form that the translator knows, executed and compared with numpy; on a GPU (`-m gpu`) this checks the emulator itself."""

from __future__ import annotations

import ctypes

import conformance
import numpy as np
import pytest
from conformance import ROWS, THREADS, decode, round_to
from conformance_machine import WORDS, make_input
from conformance_matrices import KERNELS


def close(got: np.ndarray, expected: np.ndarray, kind: str, tolerance: float) -> np.ndarray:
    if got.dtype.kind != "f":
        return got == expected
    # numpy rounds long doubles to f16 by way of f32 for some versions: a value halfway between two is then a bit off.
    ulp = {"f16": 2.0**-10, "bf16": 2.0**-7, "f32": 2.0**-23, "f64": 2.0**-52}[kind.removesuffix("x2")]
    with np.errstate(all="ignore"):
        near = np.abs(got - expected) <= np.abs(expected) * (tolerance + ulp * (tolerance > 0)) + (1e-37 if tolerance else 0)
    return near | (got == expected) | (np.isnan(got) & np.isnan(expected))


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda i: ROWS[i].text)
def test_arithmetic(kernel_device, number):
    device, row = kernel_device, ROWS[number]
    if row.arch > device.arch:
        pytest.skip(f"needs compute capability {row.arch / 10}")
    cases, rng = list(row.cases()), np.random.default_rng(number)
    values = np.zeros((len(cases), 4, THREADS), np.uint64)
    for k, chosen in enumerate(cases):
        for j, kind in enumerate(row.types(chosen)[1:]):
            values[k, j] = conformance.inputs(kind, rng, row.limit)
            if row.text.startswith("{op}") and chosen.get("op") in ("div", "rem") and j == 1:
                values[k, j] = np.where(values[k, j] & np.uint64((1 << conformance.bits(kind)) - 1), values[k, j], 3)  # x / 0 is not defined
    given, got = device.array(values), device.empty((len(cases), THREADS), np.uint64)
    assert device.library.run_row(number, ctypes.c_void_p(given.ptr), ctypes.c_void_p(got.ptr), ctypes.c_void_p(device.stream)) == 0
    stored = got.numpy()
    device.check()
    for k, chosen in enumerate(cases):
        out, *ins = row.types(chosen)
        operands = [decode(values[k, j], kind) for j, kind in enumerate(ins)]
        with np.errstate(all="ignore"):
            expected = round_to(row.reference(chosen, *operands), out)
        result = decode(stored[k], out)
        result = result.astype(expected.dtype) if result.dtype.kind == "f" else result
        good = close(result, expected, out, row.tolerance)
        assert good.all(), (row.text.format(**chosen), [(o[~good][:3]).tolist() for o in operands], result[~good][:3].tolist(), expected[~good][:3].tolist())


@pytest.mark.parametrize("number", range(len(KERNELS)), ids=lambda i: KERNELS[i].name)
def test_machine(kernel_device, number):
    device, kernel = kernel_device, KERNELS[number]
    if kernel.arch > device.arch:
        pytest.skip(f"needs compute capability {kernel.arch / 10}")
    values = make_input(np.random.default_rng(number))
    expected = kernel.expected(values)
    for schedule in device.schedules(seeds=1):
        given, got = device.array(values), device.empty(WORDS, np.uint64)
        assert device.library.run_kernel(number, ctypes.c_void_p(given.ptr), ctypes.c_void_p(got.ptr), ctypes.c_void_p(device.stream)) == 0, device.reports()
        wrong = np.flatnonzero(got.numpy()[: len(expected)] != expected)
        assert not len(wrong), (schedule, wrong[:8], [hex(v) for v in got.numpy()[wrong[:4]]], [hex(v) for v in expected[wrong[:4]]])
