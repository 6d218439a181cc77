"""Every method on one model, made and measured from scratch: `python bench/accuracy.py --text FILE --calib FILE`.

Each row of ROWS becomes a checkpoint, made by a process of its own, and is measured against the float model: perplexity, with the paired
difference and its standard error, KL divergence and equal likeliest tokens, bits per weight of the file, time and memory to make it. After
every row the numbers are written to bench/results/accuracy-<model>-<date>.json, and `--resume` goes on with the newest of these: rows that are
there are kept, one that was cut short goes on where it was. Rows that this build cannot make are skipped, with the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from machine import commit, machine  # noqa: E402

from pyengine import demo, plot  # noqa: E402
from pyengine.engine import Engine  # noqa: E402
from pyengine.evaluate import Scores, score, summary, text_windows  # noqa: E402
from pyengine.files import cache_folder, read_text  # noqa: E402
from pyengine.formats import open_checkpoint  # noqa: E402
from pyengine.inspect import describe  # noqa: E402
from pyengine.loader import load  # noqa: E402
from pyengine.quantizer import methods  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("model", "text", "calib", "windows", "context", "kl_windows", "group_size")  # what makes rows comparable
# Name → options of `quantize`; group_size and calib are those of the command line where they are not given here. None is the method's own.
ROWS = {
    "RTN": {"method": "rtn"},
    "RTN, asymmetric": {"method": "rtn", "symmetric": False},
    "RTN, groups of 32": {"method": "rtn", "group_size": 32},
    "GPTQ as published": {"method": "gptq", "grid": "range"},
    "GPTQ": {"method": "gptq"},
    "GPTQ, asymmetric": {"method": "gptq", "symmetric": False},
    "GPTQ, groups of 32": {"method": "gptq", "group_size": 32},
    "GPTQ, a scale a row": {"method": "gptq", "group_size": 0},
    "GPTQ, groups of 64": {"method": "gptq", "group_size": 64},
    "RSQ": {"method": "rsq"},
    "BoA": {"method": "boa"},
    "GPFQ": {"method": "gpfq"},
    "AWQ": {"method": "awq"},
    "FlexRound": {"method": "flexround"},
    "LRQ": {"method": "lrq"},
    "REx": {"method": "rex"},
    "AffineQuant": {"method": "affinequant"},
    "FlatQuant": {"method": "flatquant"},
    "FlatQuant + GPTQ": {"method": "flatquant", "rounding": "gptq"},
    "FlatQuant, a scale a row": {"method": "flatquant", "group_size": 0},
    "FlatQuant + GPTQ, a scale a row": {"method": "flatquant", "rounding": "gptq", "group_size": 0},
    "automatic, 4.5 bits": {"method": "auto", "target_bits": 4.5},
    "GWQ, paper's score": {"method": "gwq-paper"},
    "GWQ + RTN": {"method": "gwq", "rounding": "rtn"},
    "GWQ + RTN, 0.68 %": {"method": "gwq", "outliers": 0.0068, "rounding": "rtn"},
    "GWQ + RTN, text of its own": {"method": "gwq", "calib": None, "rounding": "rtn"},
    "GWQ, 0.34 %, + GPTQ": {"method": "gwq", "outliers": 0.0034, "rounding": "gptq"},
    "GWQ + RTN, by matrix": {"method": "gwq", "scope": "tensor", "rounding": "rtn"},
    "GWQ + RTN, by row": {"method": "gwq", "scope": "row", "rounding": "rtn"},
    "GWQ + RTN, structured": {"method": "gwq", "scope": "structured", "rounding": "rtn"},
    "GWQ + RTN, 2 % columns": {"method": "gwq", "scope": "columns", "outliers": 0.02, "rounding": "rtn"},
    "GWQ + GPTQ": {"method": "gwq", "rounding": "gptq"},
    "GWQ, 0.68 %, + GPTQ": {"method": "gwq", "outliers": 0.0068, "rounding": "gptq"},
    "GWQ + GPTQ, by matrix": {"method": "gwq", "scope": "tensor", "rounding": "gptq"},
    "GWQ + GPTQ, text of its own": {"method": "gwq", "calib": None, "rounding": "gptq"},
    "GWQ + RSQ": {"method": "gwq", "rounding": "rsq"},
    "GWQ + BoA": {"method": "gwq", "rounding": "boa"},
    "GWQ + FlexRound": {"method": "gwq", "rounding": "flexround"},
    "RTN, 3 bits": {"method": "rtn", "bits": 3},
    "GPTQ, 3 bits": {"method": "gptq", "bits": 3},
    "GPTQ, 3 bits, groups of 32": {"method": "gptq", "bits": 3, "group_size": 32},
    "GWQ + RTN, 3 bits": {"method": "gwq", "bits": 3, "rounding": "rtn"},
    "GWQ, 0.68 %, + GPTQ, 3 bits": {"method": "gwq", "outliers": 0.0068, "bits": 3, "rounding": "gptq"},
    "GWQ + GPTQ, 3 bits": {"method": "gwq", "bits": 3, "rounding": "gptq"},
    "RTN W8A8": {"method": "rtn", "bits": 8, "group_size": 0, "act_bits": 8},
    "SmoothQuant W8A8": {"method": "smoothquant", "bits": 8, "group_size": 0, "act_bits": 8},
    "QuaRot W8A8": {"method": "quarot", "bits": 8, "group_size": 0, "act_bits": 8},
    "RTN W4A8": {"method": "rtn", "act_bits": 8},
    "GWQ + GPTQ W4A8": {"method": "gwq", "rounding": "gptq", "act_bits": 8},
    "FlatQuant W4A8": {"method": "flatquant", "group_size": 0, "act_bits": 8},
    "RTN W4A4": {"method": "rtn", "group_size": 0, "act_bits": 4},
    "SmoothQuant W4A4": {"method": "smoothquant", "group_size": 0, "act_bits": 4},
    "QuaRot W4A4": {"method": "quarot", "group_size": 0, "act_bits": 4},
    "FlatQuant W4A4": {"method": "flatquant", "group_size": 0, "act_bits": 4},
    "FlatQuant + GPTQ W4A4": {"method": "flatquant", "rounding": "gptq", "group_size": 0, "act_bits": 4},
    "QuaRot W4A4, KV 4 bits": {"method": "quarot", "group_size": 0, "act_bits": 4, "kv_bits": 4},
    "FlatQuant W4A4, KV 4 bits": {"method": "flatquant", "group_size": 0, "act_bits": 4, "kv_bits": 4},
}
# It reads its own peak: what wait4() says of a child begins with the size of the process that made it.
MAKE = """
import json, pathlib, re, sys
from pyengine.quantizer import quantize
spec = quantize(**json.loads(sys.argv[1]))["spec"]
peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())
print(json.dumps({"spec": spec, "peak_mib": round(int(peak[1]) / 1024)}))
"""


class RowError(Exception):
    """Why a row has no numbers, in one line."""


class Recorded:
    """What a model says to some windows, kept: running it again beside every row would take longer than the row."""

    def __init__(self, engine: Engine, windows: list[list[int]]):
        self.chunks = {tuple(ids): list(engine.logit_chunks(ids)) for ids in windows}

    def logit_chunks(self, ids: list[int]) -> Iterator[Tensor]:
        return iter(self.chunks[tuple(ids)])


@dataclass
class Float:
    """The model that all rows are made from: its losses on all windows, and what it says to the first `near` of them."""

    windows: list[list[int]]
    near: int
    recorded: Recorded
    scores: Scores

    @classmethod
    def of(cls, source: Path, text: str, windows: int, context: int, near: int) -> Float:
        engine = load(source)
        parts = text_windows(engine, text, context, limit_tokens=context * windows)
        return cls(parts, near, Recorded(engine, parts[:near]), score(engine, parts, progress=True))

    def against(self, engine: Engine) -> dict:
        """`evaluate.summary` of a model; probabilities are compared on the first windows only, because they take memory."""
        near = score(engine, self.windows[: self.near], self.recorded, progress=True)
        rest = self.windows[self.near :]
        far = score(engine, rest, progress=True) if rest else Scores(torch.empty(0), 0.0)
        found = Scores(torch.cat([near.loss, far.loss]), near.seconds + far.seconds)
        kept = ("kl", "kl_standard_error", "top1")
        return summary(found, self.scores.loss) | {key: value for key, value in summary(near).items() if key in kept}


def make(options: dict) -> dict:
    """Run `quantize(**options)` in a process of its own: {"spec", "seconds", "cpu_seconds", "peak_mib"}, with the defaults that it filled in.

    RowError if it fails.
    """
    start = time.perf_counter()
    command = [sys.executable, "-c", MAKE, json.dumps(options)]
    with tempfile.TemporaryFile("w+") as printed, subprocess.Popen(command, stdout=printed, stderr=subprocess.PIPE, text=True) as child:
        errors = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        report = printed.read()
    if child.returncode:
        last = errors.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise RowError(last[0].split("Error: ", 1)[-1])
    seconds = time.perf_counter() - start
    return json.loads(report) | {"seconds": round(seconds, 1), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}


def measure(reference: Float, source: Path, out: Path, options: dict) -> dict:
    """The numbers of one row; its checkpoint is removed afterwards. RowError if it cannot be made or run."""
    if options["method"] not in methods():
        raise RowError(f"this build has no method {options['method']}")
    made = make({"model": str(source), "out": str(out), "resume": True, **options}) if not out.exists() else {}
    try:
        engine = load(out)
        numbers = reference.against(engine)
    except (ValueError, RuntimeError) as e:
        raise RowError(" ".join(str(e).split())) from e
    checkpoint = open_checkpoint(out)
    found = describe(checkpoint)
    checkpoint.release()
    shutil.rmtree(out)
    return numbers | {key: found[key] for key in ("bits_per_weight", "outlier_share", "size_bytes")} | made


def open_results(settings: dict, resume: bool) -> tuple[Path, dict]:
    """The results file to write and what it holds: today's, begun anew, or the newest of this model. ValueError if that has other settings."""
    found = sorted(RESULTS.glob(f"accuracy-{settings['model']}-*.json")) if resume else []
    if not found:
        return RESULTS / f"accuracy-{settings['model']}-{time.strftime('%Y-%m-%d')}.json", settings | {"machine": machine(), "rows": {}}
    stored = json.loads(found[-1].read_text())
    different = [f"{key} was {stored.get(key)}, is {settings[key]}" for key in SETTINGS if stored.get(key) != settings[key]]
    if different:
        raise ValueError(f"{found[-1]}: cannot resume, this is another run: {'; '.join(different)}")
    return found[-1], stored


def write(file: Path, results: dict) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(file)


def table(rows: dict[str, dict]) -> list[str]:
    """The rows that have numbers, as a table for the README."""
    lines = ["| form | bits per weight | perplexity | Δ nll ± SE | KL | same top-1 | CPU s | peak MiB |", "|---|---|---|---|---|---|---|---|"]
    for name, r in rows.items():
        if "perplexity" not in r:
            continue
        cells = [name, _cell(r, "bits_per_weight", ".3f"), f"{r['perplexity']:.3f}"]
        cells += [f"{r['nll_difference']:+.4f} ± {_cell(r, 'nll_difference_standard_error', '.4f')}" if "nll_difference" in r else "–"]
        cells += [_cell(r, "kl", ".4f"), _cell(r, "top1", ".1%"), _cell(r, "cpu_seconds", ".0f"), _cell(r, "peak_mib", ".0f")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(row: dict, key: str, form: str) -> str:
    return "–" if row.get(key) is None else format(row[key], form)


def draw(results: dict, file: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    rows = {name: r for name, r in results["rows"].items() if "bits_per_weight" in r}
    title = f"{results['model']}, {results['windows']} windows of {results['context']} tokens, groups of {results['group_size']}, 16-bit activations"
    points = [(name, r["bits_per_weight"], r["perplexity"]) for name, r in rows.items() if r["options"].get("act_bits", 16) == 16]
    # What is far off would press everything else together.
    base = results["rows"]["float"]["perplexity"]
    plot.pareto([p for p in points if p[1] < 5 and p[2] < 1.5 * base], file, title, base)


def run(args: argparse.Namespace) -> None:
    if not 1 <= args.kl_windows <= args.windows:
        raise ValueError(f"kl_windows is {args.kl_windows}, expected 1 to {args.windows}, the number of windows")
    source = Path(args.model) if args.model else demo.source()
    text = read_text(args.text)
    digest = {key: hashlib.sha256(read_text(getattr(args, key)).encode()).hexdigest()[:16] for key in ("text", "calib")}
    numbers = {key: getattr(args, key) for key in ("windows", "context", "kl_windows", "group_size")}
    file, results = open_results({"model": source.stem, **digest, **numbers}, args.resume)
    chosen = {name: ROWS[name] for name in args.only or ROWS}
    work = cache_folder() / "accuracy" / source.stem
    work.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    reference = Float.of(source, text, args.windows, args.context, args.kl_windows)
    rows = results["rows"]
    rows["float"] = {"commit": commit(), **summary(reference.scores)}
    for number, (name, options) in enumerate(chosen.items(), 1):
        options = {"group_size": args.group_size, "calib": args.calib} | options
        recorded = {key: value for key, value in options.items() if key != "calib"} | ({"calib": None} if options["calib"] is None else {})
        if "perplexity" in rows.get(name, {}) and rows[name]["options"] == recorded:
            continue
        print(f"{number} of {len(chosen)}: {name}", file=sys.stderr, flush=True)
        try:
            row = measure(reference, source, work / hashlib.sha256(json.dumps(recorded).encode()).hexdigest()[:16], options)
            print(f"  perplexity {row['perplexity']:.3f}", file=sys.stderr, flush=True)
        except RowError as e:
            row = {"skipped": str(e)}
            print(f"  skipped: {e}", file=sys.stderr, flush=True)
        rows[name] = {"options": recorded, "commit": commit(), **row}
        write(file, results)
    write(file, results)
    print("\n".join(table({name: rows[name] for name in ("float", *ROWS) if name in rows})))
    draw(results, RESULTS / f"accuracy-{source.stem}.png")
    print(file, file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="float model (default: the demo model)")
    parser.add_argument("--text", required=True, help="UTF-8 text to measure on")
    parser.add_argument("--calib", required=True, help="UTF-8 text to calibrate on, another one than --text")
    parser.add_argument("--only", action="append", choices=ROWS, metavar="ROW", help="only the row of this name; may be given several times")
    parser.add_argument("--resume", action="store_true", help="go on with the newest results of this model")
    # 64, because the demo model's 576 inputs are 9 · 64
    for name, default in (("windows", 4), ("context", 2048), ("kl-windows", 1), ("group-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    try:
        run(parser.parse_args())
    except (ValueError, OSError) as e:
        print(f"accuracy.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
