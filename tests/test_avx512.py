"""The AVX-512 kernels on a machine without AVX-512: built through SIMDe, then put through all tests of kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

from pyengine import _C

ROOT = Path(__file__).resolve().parents[1]
NATIVE = next((r for r in _C.QLinear.kernels() if r["name"] == "qlinear_avx512"), None)


@pytest.mark.skipif(NATIVE is None, reason="not an x86-64 CPU")
@pytest.mark.skipif(NATIVE is not None and NATIVE["missing"] is None, reason="this CPU has AVX-512: test_kernels.py runs the kernels themselves")
@pytest.mark.skipif(not Path("/usr/include/simde").is_dir(), reason="SIMDe is not installed (Debian: libsimde-dev)")
def test_emulated_kernels(tmp_path):
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DPYENGINE_CUDA=OFF"]
    options += ["-DPYENGINE_EMULATE_AVX512=ON", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tmp_path}"]
    build = tmp_path / "build"
    # cmake and ninja come with the test extra, into a virtual environment that need not be on PATH.
    environment = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    for command in (["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], ["cmake", "--build", build]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    module = next(tmp_path.glob("_C*.so"))
    tests = [ROOT / "tests" / "test_kernels.py", ROOT / "tests" / "test_kv_cache.py", "-k", "avx512 or packing"]
    tests += [f"--native-module={module}", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " skipped" not in done.stdout and " passed" in done.stdout
