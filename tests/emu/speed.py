"""How fast the emulator is, with all checks on: `python tests/emu/speed.py` prints the matrix instructions a second, a core."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from emu import emulator  # noqa: E402
from emu.device import Emulated  # noqa: E402


def main() -> None:
    device = Emulated(emulator.kernels(), 80)
    m, k = 1024, 2048
    rng = np.random.default_rng(0)
    a, b = (device.array(rng.standard_normal((rows, k)).astype(np.float16)) for rows in (m, 64))
    d = device.empty((m, 64), np.float32)
    for workers in (1, 2):
        best = 0.0
        for seed in range(5):
            device.schedule("random", seed, workers)
            before, start = device.library.emu_mma_count(), time.perf_counter()
            device.library.run_gemm_tile(0, *(ctypes.c_void_p(x.ptr) for x in (a, b, d)), m, k, ctypes.c_void_p(device.stream))
            best = max(best, (device.library.emu_mma_count() - before) / (time.perf_counter() - start))
        device.check()
        print(f"gemm_tile {m}x64x{k}, {workers} worker(s): {best / 1e6:.3f} M mma/s, {best / 1e6 / workers:.3f} M a core")


if __name__ == "__main__":
    main()
