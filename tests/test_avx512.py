"""The AVX-512 and AMX kernels on any machine with AVX2: built on top of emulated instructions, then put through the tests of kernels.

It runs where nothing is missing as well: the emulation's tiles fault outside of their begin() and end(), and it must
not rot where everybody has the hardware.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

from pyengine import ops

ROOT = Path(__file__).resolve().parents[1]
AVX2 = [r for r in ops.kernels()["QLinear"] if r["name"] == "qlinear_avx2" and not r["missing"]]


@pytest.mark.skipif(not AVX2, reason="not an x86-64 CPU with AVX2, which the emulation is made of")
@pytest.mark.skipif(not Path("/usr/include/simde").is_dir(), reason="SIMDe is not installed (Debian: libsimde-dev)")
def test_emulated_kernels(tmp_path):
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DPYENGINE_CUDA=OFF"]
    options += ["-DPYENGINE_EMULATE_AVX512=ON", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tmp_path}"]
    build = tmp_path / "build"
    # cmake and ninja come with the test extra, into a virtual environment that need not be on PATH.
    environment = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    for command in (["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], ["cmake", "--build", build, "--target", "_C"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    module = next(tmp_path.glob("_C*.so"))
    tests = [ROOT / "tests" / f"test_{name}.py" for name in ("kernels", "bounds", "kv_cache", "kv_cache4", "transform", "rope_amx", "amx_int8", "round_columns")]
    options = ["-k", "avx512 or amx or packing or packed", f"--native-module={module}", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", *tests, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " skipped" not in done.stdout and " passed" in done.stdout
