"""The benchmark binary: it sees the whole dispatch table, checks every row that runs here, and refuses nonsense with one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pyengine import ops

BINARY = Path(__file__).resolve().parents[1] / "build" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "qbench"
NAMES = {
    "QLinear": "qlinear", "Embedding": "embedding", "ScatterAdd": "scatter_add", "RmsNorm": "rmsnorm", "SiluMul": "silu_mul",
    "Transform": "transform", "RopeKV": "rope_kv", "Attention": "attention", "Sample": "sample", "RoundColumns": "round_columns",
}  # fmt: skip
TABLE = [{"op": NAMES[op], **row} for op, rows in ops.kernels().items() for row in rows]
# One shape and options of a linear that every kind of row takes, and shapes of the others, small and uneven.
PROBLEMS = {
    "qlinear": [["--shape", "5,72,256"], ["--shape", "1,40,64", "--group", "32", "--outliers", "0.2"], ["--shape", "300,33,128", "--mask", "uniform"],
                ["--shape", "17,72,256", "--columns", "0.05"]],
    "rmsnorm": [["--shape", "3,577"]],
    "silu_mul": [["--shape", "3,100"]],
    "transform": [["--shape", "3,5,8"], ["--shape", "40,24,24"], ["--shape", "20,9,64"]],
    "rope_kv": [["--shape", "3,6,2,64", "--context", "70"], ["--shape", "40,6,2,64"], ["--shape", "40,6,2,64", "--basis"]],
    "attention": [["--shape", "3,6,2,64", "--context", "70"], ["--shape", "40,6,2,64"]],
}


def qbench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([BINARY, *arguments], capture_output=True, text=True, timeout=300)


def test_it_is_built():
    assert BINARY.is_file(), "qbench is built with the module; install the package in editable mode"


def test_list_is_the_dispatch_table():
    listed = json.loads(qbench("--list", "--json").stdout)["kernels"]
    key = ("op", "name", "device", "rank", "missing")
    assert [{k: row[k] for k in key} for row in listed] == [{k: row[k] for k in key} for row in TABLE]
    lines = qbench("--list").stdout.splitlines()
    assert [line.split()[1] for line in lines] == [row["name"] for row in TABLE]


def test_list_of_one_device():
    for device in ("cpu", "cuda"):
        listed = json.loads(qbench("--list", "--json", "--device", device).stdout)["kernels"]
        assert [row["name"] for row in listed] == [row["name"] for row in TABLE if row["device"] == device]


@pytest.mark.skipif(all(row["missing"] is None for row in TABLE if row["device"] == "cuda"), reason="this machine has a GPU, or the build has no CUDA")
def test_without_a_gpu_it_says_so_at_once():
    for arguments in ((), ("--op", "qlinear", "--shape", "1,64,64", "--check", "--json"), ("--kernel", "rmsnorm_sm80")):
        done = qbench("--device", "cuda", *arguments)
        assert done.returncode == 1 and not done.stdout and done.stderr.startswith("qbench: no CUDA device: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("op", PROBLEMS)
def test_every_row_passes_its_check(op):
    here = [row["name"] for row in TABLE if row["op"] == op and row["missing"] is None and row["device"] == "cpu"]
    seen = set()
    for problem in PROBLEMS[op]:
        for act_bits in {"qlinear": ("8", "16"), "transform": ("4", "8", "16")}.get(op, ("16",)):
            done = qbench("--op", op, *problem, "--act-bits", act_bits, "--check", "--cold", "1", "--json")
            assert done.returncode == 0, done.stderr
            for row in json.loads(done.stdout)["rows"]:
                assert row["op"] == op and 0 <= row["error"] <= 1e-2 and row["us"] > 0 and row["gb_s"] > 0 and row["gop_s"] > 0
                seen.add(row["kernel"])
    assert seen == {name for name in here if not name.endswith("_reference")}


def test_layers_of_a_model_and_the_baselines():
    done = qbench("--model", "smollm2-135m", "--tokens", "1,3", "--op", "qlinear", "--kernel", "qlinear_avx2", "--cold", "2", "--threads", "1", "--json")
    if done.returncode:
        pytest.skip(done.stderr)
    result = json.loads(done.stdout)
    machine = result["machine"]
    assert machine["threads"] == 1 and machine["cold_mib"] == 2 and machine["read_gb_s"] > 0 and machine["fp32_gop_s"] > 0
    shapes = [(row["m"], row["layer"], row["n"], row["k"], row["bits"], row["group"]) for row in result["rows"]]
    layers = [("qkv", 960, 576, 4, 64), ("o", 576, 576, 4, 64), ("gate_up", 3072, 576, 4, 64), ("down", 576, 1536, 4, 128), ("head", 49152, 576, 8, 64)]
    assert shapes == [(m, *layer) for m in (1, 3) for layer in layers]
    for row in result["rows"]:
        assert row["fp32_us"] > 0 and row["bf16_us"] > 0 and row["of_peak"] > 0 and row["error"] is None
        # 4 bits a code, 16 a scale, 32 an outlier in a hundredth of the weights, and x and y.
        n, k, m = row["n"], row["k"], row["m"]
        sparse = 0.04 * n * k + 4 * n if row["bits"] == 4 else 0
        expected = n * k * row["bits"] / 8 + 2 * n * k / row["group"] + sparse + 4 * m * (n + k)
        assert row["gb_s"] * row["us"] * 1e3 == pytest.approx(expected, rel=0.05)


def test_sites_of_a_model():
    done = qbench("--model", "smollm2-135m", "--op", "transform", "--act-bits", "8", "--check-only", "--json")
    rows = {row["layer"]: (row["a"], row["b"], row["act_bits"]) for row in json.loads(done.stdout)["rows"]}
    assert rows == {"attn_in": (24, 24, 8), "o_in": (9, 64, 8), "mlp_in": (24, 24, 8), "down_in": (32, 48, 8)}


def test_a_kernel_by_name_even_the_reference():
    done = qbench("--kernel", "silu_mul_reference", "--shape", "2,8", "--op", "silu_mul", "--json")
    assert [row["kernel"] for row in json.loads(done.stdout)["rows"]] == ["silu_mul_reference"]


def test_text_has_a_line_for_each_row():
    done = qbench("--op", "silu_mul", "--shape", "2,64", "--check")
    lines = done.stdout.splitlines()
    assert "GB/s" in lines[0] and lines[2].split()[:3] == ["op", "kernel", "layer"]
    assert [line.split()[0] for line in lines[3:]] == ["silu_mul"] * len(lines[3:]) and len(lines) > 3


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--nonsense"], 2, "unknown option '--nonsense'"),
        (["--shape"], 2, "--shape needs a value"),
        (["--op", "qlinear", "--shape", "1,4,x"], 2, "'x', expected a number"),
        (["--threads", "99999999999999"], 2, "expected a number"),
        (["--mask", "round"], 2, "expected skewed or uniform"),
        (["--device", "tpu"], 2, "expected cpu or cuda"),
        (["--dtype", "f32"], 2, "expected f16 or bf16"),
        (["--device", "cuda", "--kernel", "silu_mul_reference"], 1, "silu_mul_reference runs on the CPU"),
        (["--op", "convolution"], 1, "known are qlinear"),
        (["--kernel", "gemm"], 1, "no kernel is called 'gemm'"),
        (["--model", "gpt-2"], 1, "known are llama-2-7b"),
        (["--shape", "1,64,64"], 1, "--shape needs --op"),
        (["--op", "qlinear", "--shape", "1,2"], 1, "has 2 numbers, qlinear takes 3"),
        (["--op", "qlinear", "--shape", "0,4,4"], 1, "expected 1 to 65536"),
        (["--op", "qlinear", "--shape", "1,4,100", "--group", "64"], 1, "does not divide K = 100"),
        (["--op", "qlinear", "--shape", "1,1048576,1048576"], 1, "too large"),
        (["--op", "transform", "--shape", "1,300,2"], 1, "A of --shape is 300, expected 1 to 256"),
        (["--op", "transform", "--shape", "1,3,5", "--act-bits", "4"], 1, "A times B is odd"),
        (["--basis", "--device", "cuda"], 1, "--basis is for the CPU"),
        (["--op", "attention", "--shape", "1,5,2,64"], 1, "5 heads cannot share 2"),
        (["--outliers", "nan"], 1, "expected 0 to 0.5"),
        (["--columns", "0.6"], 1, "expected 0 to 0.5"),
        (["--bits", "3"], 1, "expected 4 or 8"),
        (["--threads", "0"], 1, "expected 1 to 1024"),
    ],
)
def test_hostile_arguments_end_in_one_line(arguments, code, says):
    done = qbench(*arguments)
    assert done.returncode == code and not done.stdout
    assert says in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("qbench: ")
