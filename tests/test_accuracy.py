"""The table of methods: made by processes of their own, measured against the float model, continued where it was cut short."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from pyengine.evaluate import perplexity
from pyengine.files import read_text
from pyengine.loader import load
from pyengine.quantizer import request

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("accuracy", BENCH / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["accuracy"] = module
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(module, "ROWS", {
        "RTN": {"method": "rtn"}, "magic": {"method": "magic"}, "nine bits": {"method": "rtn", "bits": 9}, "RTN W8": {"method": "rtn", "bits": 8},
    })  # fmt: skip
    return module


def test_rows_are_measured_skipped_and_kept(bench, stories, data, tmp_path, monkeypatch, capfd):
    text, calib = tmp_path / "text", tmp_path / "calib"
    text.write_text(read_text(data / "wikitext2_test.txt")[:4000])
    calib.write_text("Once upon a time")

    def run(*arguments) -> int:
        options = ("--model", stories, "--text", text, "--calib", calib, "--context", 256, "--windows", 3, "--group-size", 32)
        monkeypatch.setattr(sys, "argv", ["accuracy.py", *map(str, options + arguments)])
        return bench.main()

    ballast = torch.ones(1 << 27)  # 512 MiB, which must not be counted as those of a row
    assert run("--only", "RTN", "--only", "magic", "--only", "RTN W8") == 0
    del ballast
    file = next((tmp_path / "results").glob("accuracy-stories260k-*.json"))
    rows = json.loads(file.read_text())["rows"]
    assert rows["magic"]["skipped"] == "this build has no method magic" and set(rows) == {"float", "RTN", "RTN W8", "magic"}
    assert rows["float"]["perplexity"] == pytest.approx(perplexity(load(stories), read_text(text), 256, 768)["perplexity"], rel=1e-6)
    assert abs(rows["RTN W8"]["nll_difference"]) < 0.02 < rows["RTN"]["nll_difference"] and rows["RTN W8"]["kl"] < 0.01 < rows["RTN"]["kl"]
    assert rows["RTN"]["nll_difference"] == pytest.approx(rows["RTN"]["nll"] - rows["float"]["nll"], abs=1e-7)
    assert 4.25 < rows["RTN"]["bits_per_weight"] < 6 and 50 < rows["RTN"]["peak_mib"] < 512 and rows["RTN"]["cpu_seconds"] > 0
    assert (rows["RTN"]["spec"]["group_size"], rows["RTN"]["spec"]["grid"]) == (32, "range")
    assert not any((tmp_path / "cache" / "accuracy" / "stories260k").iterdir())
    printed = capfd.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed] == ["| form", "|---|---|---|---|---|---|---|---|", "| float", "| RTN", "| RTN W8"]

    stored = json.loads(file.read_text())
    stored["rows"]["RTN"]["perplexity"] = 1.5
    file.write_text(json.dumps(stored))
    assert run("--resume") == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows["RTN"]["perplexity"] == 1.5 and rows["nine bits"]["skipped"] == "bits is 9, expected one of 2, 3, 4, 8"
    capfd.readouterr()
    assert run("--resume", "--windows", "2") == 1
    assert "cannot resume, this is another run: windows was 3, is 2" in capfd.readouterr().err


def test_every_row_is_a_call_of_quantize(bench):
    """One that does not exist, or does not go with the others, would be found out after the hours before it."""
    fresh = importlib.util.spec_from_file_location("accuracy_rows", BENCH / "accuracy.py")
    module = importlib.util.module_from_spec(fresh)
    sys.modules["accuracy_rows"] = module
    fresh.loader.exec_module(module)
    for options in module.ROWS.values():
        method, rest = options["method"], {key: value for key, value in options.items() if key not in ("method", "calib")}
        request(method, {"group_size": 64} | rest)
    assert len(module.ROWS) > 20
