"""What nvcc makes of the CUDA kernels, on a machine without a GPU: no spills, the instructions that the design counts on."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest


CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHS = ("80", "90a")
CASES = [(f.stem, arch) for f in sorted(CSRC.glob("cuda/*.cu")) for arch in ARCHS if arch == "90a" or not f.stem.endswith("_sm90")]

# File → the instructions that each of its kernels must have.
EXPECTED = {
    "attention_sm80": (r"HMMA\.16816\.F32", r"STS\.128", r"STG\.E\.128"),
    "embedding_sm80": (r"LDG\.E\.128", r"STG\.E\.128"),
    "qlinear_decode_sm80": (r"HMMA\.16816\.F32", r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128"),
    "qlinear_gemm_sm80": (r"HMMA\.16816\.F32", r"LDSM\.16\.M88\.4", r"LDGSTS\.E\.BYPASS\.128", r"STS\.128", r"STG\.E\.128"),
    "qlinear_gemm_sm90": (r"HGMMA\.64x128x16\.F32", r"UTMALDG\.2D", r"UBLKCP", r"STS\.128", r"STG\.E\.128"),
    "qlinear_int_sm80": (r"LDGSTS\.E\.BYPASS\.128",),  # and the test below
    "qlinear_int_sm90": (r"HMMA\.16816\.F32", r"IGMMA\.64x(64|128)x32\.S8\.S8", r"UBLKCP", r"LDS\.(64|128)", r"STG\.E\.128"),
    "rmsnorm_sm80": (r"LDG\.E\.128", r"STG\.E\.128"),
    "rope_kv_sm80": (r"LDG\.E\.128", r"STG\.E\.128"),
    "rope_kv_codes_sm80": (r"LDS\.128",),
    "sample_sm80": (r"LDG\.E\.128", r"MUFU\.RCP"),
    "silu_mul_sm80": (r"LDG\.E\.128", r"STG\.E\.128"),
    "transform_sm90": (r"HGMMA\.64x(64|112)x16\.F32", r"STSM\.16\.MT88\.4", r"STS\.128", r"LDS\.128", r"STG\.E\.128"),
    "transform_sm80": (r"HMMA\.16816\.F32", r"LDSM\.16\.MT88\.4", r"LDG\.E\.128", r"STG\.E\.128"),
}
# File → stores of 4 and 8 bytes that are meant: a token's number, its scale and eight of its codes, a head's largest score and sum of weights,
# two elements of a head.
NARROW = {"sample_sm80": 1, "transform_sm80": 3, "transform_sm90": 1, "attention_sm80": 2, "rope_kv_codes_sm80": 99}


def nvdisasm() -> str | None:
    """The one on PATH, or that of the package nvidia-cuda-nvdisasm."""
    packaged = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or (str(packaged[-1]) if packaged else None)


pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
needs_nvdisasm = pytest.mark.skipif(nvdisasm() is None, reason="nvdisasm is not installed (package nvidia-cuda-nvdisasm)")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(file, arch) → (cubin, what ptxas says about its kernels), each compiled once."""
    folder, done = tmp_path_factory.mktemp("cubin"), {}

    def get(name: str, arch: str) -> tuple[Path, str]:
        if (name, arch) not in done:
            cubin, source = folder / f"{name}.{arch}.cubin", CSRC / "cuda" / f"{name}.cu"
            command = ["nvcc", "-std=c++20", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-I", CSRC, source, "-o", cubin]
            made = subprocess.run(command, capture_output=True, text=True)
            assert made.returncode == 0, made.stderr
            done[name, arch] = cubin, made.stderr
        return done[name, arch]

    return get


def instructions(cubin: Path) -> dict[str, list[str]]:
    """Kernel → its instructions, with "label:" where a jump may lead."""
    text = subprocess.run([nvdisasm(), cubin], capture_output=True, text=True, check=True).stdout
    kernels, current = {}, None
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            current = kernels.setdefault(section[1], [])
        elif current is not None and (found := re.match(r"(\.L_\S+:)", line) or re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)):
            current.append(re.sub(r"^@!?U?P\w+\s+", "", found[1]))
    return kernels


def loops(code: list[str]) -> list[list[str]]:
    """The pieces of code between a label and a jump back to it."""
    label = {line[:-1]: i for i, line in enumerate(code) if line.startswith(".L_")}
    jumps = [(i, re.search(r"BRA.*`\((\.L_\S+)\)", line)) for i, line in enumerate(code)]
    return [code[label[to[1]] : i + 1] for i, to in jumps if to and label.get(to[1], i + 1) <= i]


@pytest.mark.parametrize("name, arch", CASES)
def test_kernels_do_not_spill(compiled, name, arch):
    log = compiled(name, arch)[1]
    assert "warning" not in log, log
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) == log.count("Compiling entry function")
    assert all(frame == ("0", "0", "0") for frame in frames), log


@needs_nvdisasm
@pytest.mark.parametrize("name, arch", [case for case in CASES if case[0] != "device"])
def test_kernels_have_the_instructions_that_they_were_designed_for(compiled, name, arch):
    for kernel, code in instructions(compiled(name, arch)[0]).items():
        assert not [line for line in code if re.match(r"(LDL|STL)\b", line)], kernel
        parts = [line for line in code if re.match(r"(LDGSTS|STG)\.E(\.BYPASS)?(\.64)?(\.ZFILL)? ", line)]
        assert len(parts) <= NARROW.get(name, 0), (kernel, parts)  # else a store of 16 bytes has come apart
        for pattern in EXPECTED[name]:
            assert any(re.match(pattern, line) for line in code), (kernel, pattern)


@needs_nvdisasm
@pytest.mark.parametrize("arch", ARCHS)
def test_integers_are_multiplied_by_the_tensor_cores_that_there_are(compiled, arch):
    """INT4 on compute capability 8.x alone: on Hopper ptxas would call a function of 190 instructions for each product."""
    for kernel, code in instructions(compiled("qlinear_int_sm80", arch)[0]).items():
        four = "Li4ELi4E" in kernel
        found = {re.match(r"IMMA[\w.]*", line)[0] for line in code if line.startswith("IMMA")}
        assert found == ({"IMMA.16864.S4.S4"} if four and arch == "80" else set() if four else {"IMMA.16832.S8.S8"}), kernel
        for pattern in (r"HMMA\.16816\.F32", r"LDSM\.16\.M88\.4", r"LDS\.(64|128)", r"STG\.E\.128") if found else ():
            assert any(re.match(pattern, line) for line in code), (kernel, pattern)


@needs_nvdisasm
@pytest.mark.parametrize("arch", ARCHS)
def test_decode_stays_within_its_issue_slots(compiled, arch):
    """At 4.3 TB/s a processor of an H200 gets a tile of 64 × 64 INT4 weights with 1 % outliers in 123 clocks, 492 issue slots: what is
    counted here for up to 8 tokens must fit, or the kernel cannot run at the memory's speed. Loops are counted with all their branches."""
    code = next(c for k, c in instructions(compiled("qlinear_decode_sm80", arch)[0]).items() if "halfLi4ELi1E" in k)
    bodies = [[line for line in loop if not line.startswith(".L_")] for loop in loops(code)]
    counted = [(len(body), Counter(re.match(r"\w+", line)[0] for line in body)) for body in bodies]
    tile = min(size for size, ops in counted if ops["HMMA"] == 16)
    entries = min(size / ops["HMMA"] for size, ops in counted if ops["HMMA"] and ops["LDG"])  # sixteen of them
    assert tile <= 405 and entries <= 56
    assert tile + entries * 0.01 * 64 * 64 / 16 < 550  # of which ~70 are in branches that groups of 64 and more with f16 scales do not take
