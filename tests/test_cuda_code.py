"""What nvcc makes of the CUDA kernels, on a machine without a GPU: no spills, and a clear word about what is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pyengine import _C

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHS = ("80", "90a")
CASES = [(f.name, arch) for f in sorted(CSRC.glob("cuda/*.cu")) for arch in ARCHS if arch == "90a" or not f.stem.endswith("_sm90")]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(file, arch) → (cubin, what ptxas says about its kernels), each compiled once."""
    folder, done = tmp_path_factory.mktemp("cubin"), {}

    def get(name: str, arch: str) -> tuple[Path, str]:
        if (name, arch) not in done:
            cubin = folder / f"{name}.{arch}.cubin"
            command = ["nvcc", "-std=c++20", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-I", CSRC, CSRC / "cuda" / name, "-o", cubin]
            made = subprocess.run(command, capture_output=True, text=True)
            assert made.returncode == 0, made.stderr
            done[name, arch] = cubin, made.stderr
        return done[name, arch]

    return get


@needs_nvcc
@pytest.mark.parametrize("name, arch", CASES)
def test_kernels_do_not_spill(compiled, name, arch):
    log = compiled(name, arch)[1]
    assert "warning" not in log, log
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) == log.count("Compiling entry function")
    assert all(frame == ("0", "0", "0") for frame in frames), log


def test_a_machine_without_a_gpu_says_so():
    rows = [row for row in _C.RmsNorm.kernels() if row["device"] == "cuda"]
    if not rows:
        pytest.skip("built without CUDA")
    if rows[0]["missing"] is None:
        pytest.skip("this machine has a GPU")
    op = _C.RmsNorm()
    op.dtype = 1
    with pytest.raises(RuntimeError, match="rmsnorm_sm80: no CUDA device: "):
        op.choose()
    with pytest.raises(RuntimeError, match="no CUDA device: "):
        op.run(kernel="rmsnorm_sm80")


def test_the_type_of_the_activations_says_which_device_an_op_is_for():
    op = _C.RmsNorm()
    op.dtype = 2
    with pytest.raises(RuntimeError, match="rmsnorm_reference: takes f32 activations"):
        op.run(kernel="rmsnorm_reference")
    for row in _C.RmsNorm.kernels():
        if row["device"] == "cuda" and row["missing"] is None:
            with pytest.raises(RuntimeError, match="takes f16 or bf16 activations"):
                _C.RmsNorm().choose(row["name"])
