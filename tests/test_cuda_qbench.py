"""qbench --device cuda with its host code on this machine's processor and its kernels on the emulated GPUs: what it packs, places, runs and
compares is what a GPU would get; times mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
from emu import emulator

PROGRAM = """
import ctypes, sys
sys.path.insert(0, {tests!r})
from emu import emulator
library = emulator.module()[0]
library.emu_configure(1, 3, 2, 1, {arch})
arguments = [b"qbench", *map(str.encode, {arguments!r})]
code = library.emu_qbench(len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
ctypes.CDLL(None).fflush(None)
sys.stderr.write(library.emu_reports().decode())
sys.exit(code)
"""
KERNELS = {80: {"qlinear_decode_sm80", "qlinear_gemm_sm80", "qlinear_int_sm80"}}
KERNELS[90] = KERNELS[80] | {"qlinear_gemm_sm90", "qlinear_int_sm90"}


def qbench(arch: int, *arguments: str) -> subprocess.CompletedProcess:
    program = PROGRAM.format(tests=str(Path(__file__).parent), arch=arch, arguments=arguments)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)


@pytest.fixture(autouse=True, scope="module")
def emulator_works():
    if why := emulator.reason_to_skip():
        pytest.skip(why)
    if find_library("cublasLt"):
        pytest.skip("qbench would try libcublasLt, which is installed here, on the emulated GPU")
    emulator.build("emu_module")


@pytest.mark.parametrize("arch", KERNELS)
def test_linears_pass_their_check(arch):
    seen = set()
    plain = ["--bits", "8", "--group", "0", "--dtype", "bf16", "--outliers", "0"]
    columns = ["--columns", "0.05"]
    sparse, integers = ["--group", "64", "--outliers", "0.1", *columns], [*plain, *columns, "--bits", "4", "--act-bits", "8"]
    for shape, more in (("3,72,128", sparse), ("18,70,96", plain), ("18,70,96", integers)):
        done = qbench(arch, "--device", "cuda", "--op", "qlinear", "--shape", shape, *more, "--cold", "0", "--check", "--json")
        assert done.returncode == 0 and not done.stderr, done.stderr
        result = json.loads(done.stdout)
        assert result["machine"]["gpu"] == "emulated GPU" and result["machine"]["compute_capability"] == arch and result["machine"]["cublas"] is None
        assert {"driver", "cuda", "commit", "copy_gb_s"} <= result["machine"].keys()
        for row in result["rows"]:
            assert 0 < row["error"] <= (1e-3 if row["dtype"] == "f16" else 6e-3) and row["us"] > 0 and row["copies"] == 1
            assert row["fp16_us"] is None and row["int8_us"] is None
            seen.add(row["kernel"])
    assert seen == KERNELS[arch]


@pytest.mark.parametrize(
    "op, shape, kernels",
    (
        ("rmsnorm", "3,576", {"rmsnorm_sm80"}),
        ("silu_mul", "3,64", {"silu_mul_sm80"}),
        ("transform", "3,64,64", {"transform_sm80", "transform_sm90"}),
        ("rope_kv", "3,6,2,64", {"rope_kv_sm80", "rope_kv_codes_sm80"}),
        ("attention", "3,6,2,64", {"attention_sm80"}),
    ),
)
def test_the_other_ops_pass_their_check(op, shape, kernels):
    done = qbench(90, "--device", "cuda", "--op", op, "--shape", shape, "--context", "20", "--cold", "0", "--check", "--json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["kernel"] for row in rows} == kernels
    assert all(row["op"] == op and 0 < row["error"] <= (2e-3 if op == "attention" else 1e-3) and row["us"] > 0 for row in rows)


@pytest.mark.parametrize("act_bits, dtype", (("16", "f16"), ("8", "f16"), ("4", "bf16")))
def test_a_model_s_transforms_are_timed_beside_their_steps(act_bits, dtype):
    options = ("--model", "smollm2-135m", "--tokens", "2", "--act-bits", act_bits, "--dtype", dtype, "--cold", "0", "--check", "--json")
    done = qbench(80, "--device", "cuda", "--op", "transform", *options)
    assert done.returncode == 0 and not done.stderr, done.stderr
    rows = json.loads(done.stdout)["rows"]
    found = [(row["layer"], row["a"], row["b"], row["before"], row["apart_us"] is not None) for row in rows]
    norm = ("attn_in", 24, 24, "norm", True)
    sites = [norm, ("o_in", 9, 64, None, act_bits != "16"), ("mlp_in", *norm[1:]), ("down_in", 32, 48, "silu_mul", True)]
    assert found == sites and all(0 < row["error"] <= (1e-3 if dtype == "f16" else 1e-2) for row in rows)


def test_cold_weights_are_copied_until_they_take_as_much():
    done = qbench(80, "--device", "cuda", "--kernel", "qlinear_decode_sm80", "--op", "qlinear", "--shape", "1,256,1024", "--cold", "1", "--check")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "no libcublasLt is found" in done.stdout and "qlinear_decode_sm80" in done.stdout.splitlines()[-1]
