"""bench/h200.sh and what puts its results together, as far as they go without a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROW = {"op": "qlinear", "kernel": "qlinear_decode_sm80", "layer": "o", "m": 1, "n": 64, "k": 128, "bits": 4, "outliers": 0.01}


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_without_a_gpu_it_stops_with_one_line(tmp_path):
    done = subprocess.run([ROOT / "bench" / "h200.sh", tmp_path / "out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "bench/h200.sh: no GPU: there is no nvidia-smi\n")
    assert not (tmp_path / "out").exists()


def test_parts_make_one_file_and_a_table(tmp_path):
    parts, out = tmp_path / "parts", tmp_path / "gpu.json"
    parts.mkdir()
    for name, measured in (("a", {"us": 5.0, "of_peak": 0.7, "fp16_us": 20.0}), ("b", {"us": 6.0, "of_peak": None, "fp16_us": None})):
        (parts / f"{name}.json").write_text(json.dumps({"machine": {"gpu": "G"}, "rows": [ROW | measured]}))
    site = {"op": "transform", "kernel": "transform_sm90", "layer": "down_in", "m": 2048, "act_bits": 4, "us": 30.0, "of_peak": 0.5, "apart_us": 90.0}
    whole = ROW | {"kernel": "qlinear_int_sm90", "act_bits": 8, "group": 128, "us": 4.0, "of_peak": 0.5, "fp16_us": 8.0, "int8_us": 5.0}
    grouped, columns = whole | {"group": 64}, whole | {"columns": 0.01}
    (parts / "d.json").write_text(json.dumps({"machine": {"gpu": "G"}, "rows": [site, whole, grouped, columns]}))
    (parts / "c.json.partial").write_text("{")  # a run that was stopped
    (parts / "peers.json").write_text(json.dumps({"rows": [{"peer": "torch int4", "m": 1, "n": 64, "k": 128, "bits": 4, "us": 9.5}], "skipped": {}}))
    command = [sys.executable, ROOT / "bench" / "gpu_results.py", parts, out, "build: done in 3 s", "c: stopped after 2 s"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    whole, grouped, columns, _, site = lines[3:]
    assert whole.split() == "W4A8 1 % o 1 qlinear_int_sm90 4.0 50 % 8.0 2.00 5.0 1.25".split()
    assert grouped.startswith("W4A8 1 % g64 ") and columns.startswith("W4A8 1 % c1 % ")
    assert site.split() == "transform a4 down_in 2048 transform_sm90 30.0 50 % 90.0 3.00".split()
    lines = lines[:3]
    assert [line.split()[:9] for line in lines[1:]] == [
        ["W4", "1", "%", "o", "1", "qlinear_decode_sm80", "5.0", "70", "%"], ["W4", "1", "%", "o", "1", "qlinear_decode_sm80", "6.0", "-", "-"]
    ]  # fmt: skip
    assert all(line.endswith("torch int4 9.5") for line in lines[1:]) and "4.00" in lines[1]
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 6 and result["phases"] == ["build: done in 3 s", "c: stopped after 2 s"] and result["peers"]["rows"]
