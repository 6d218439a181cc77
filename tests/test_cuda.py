"""The CUDA kernels, forced by name, against numpy in float64: on the emulated GPUs, and with `-m gpu` on a real one."""

from __future__ import annotations

import numpy as np
import pytest

DTYPES = {"f16": 1, "bf16": 2}


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, as u16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    return values.astype(np.float16) if dtype == "f16" else to_bf16(values)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    return stored.astype(np.float64) if dtype == "f16" else (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", (False, True))
def test_rmsnorm(device, dtype, with_residual):
    rng = np.random.default_rng(0)
    for m, n in ((1, 8), (3, 64), (2, 576), (5, 2056), (1, 4096)):
        x, residual = (encode(rng.standard_normal((m, n)) * 3, dtype) for _ in range(2))
        weight = rng.standard_normal(n).astype(np.float32)
        for schedule in device.schedules():
            xs, ws, ys = device.array(x, "x"), device.array(weight, "weight"), device.empty((m, n), x.dtype, "y")
            rs = device.array(residual, "residual", read_only=False)
            op = device.ops.RmsNorm()
            op.m, op.n, op.eps, op.dtype = m, n, 1e-5, DTYPES[dtype]
            op.x, op.weight, op.y, op.residual = xs.ptr, ws.ptr, ys.ptr, rs.ptr if with_residual else 0
            op.run(stream=device.stream, kernel="rmsnorm_sm80")
            total = decode(x, dtype) + (decode(residual, dtype) if with_residual else 0)
            unit = 2.0**-11 if dtype == "f16" else 2.0**-8
            if with_residual:
                assert np.array_equal(rs.numpy(), encode(total, dtype)), schedule
                total = decode(encode(total, dtype), dtype)
            expected = total / np.sqrt((total**2).mean(1, keepdims=True) + 1e-5) * weight
            assert np.abs(decode(ys.numpy(), dtype) - expected).max() <= unit * np.abs(expected).max() * 1.01, schedule
