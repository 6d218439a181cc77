"""Perplexity of quantized forms of one model, made and measured from scratch: `python bench/accuracy.py --text FILE --calib FILE`.

Prints a table and writes the numbers, with machine and commit, to bench/results/. `closed` is the share of the perplexity that
rounding to nearest loses (groups of 64) and that a method wins back.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from pyengine import demo
from pyengine.evaluate import perplexity
from pyengine.files import read_text
from pyengine.formats import open_checkpoint
from pyengine.inspect import describe
from pyengine.loader import load
from pyengine.quantizer import quantize

RESULTS = Path(__file__).parent / "results"
# Name → options of `quantize`; groups of 64, because the demo model's 576 inputs are 9 · 64.
FORMS = {
    "RTN g64": {"method": "rtn"},
    "RTN g32": {"method": "rtn", "group_size": 32},
    "GWQ, paper's score, 1 %": {"method": "gwq-paper"},
    "GWQ, 0.63 %": {"method": "gwq", "outliers": 0.0063},
    "GWQ, 1 %": {"method": "gwq"},
    "GWQ, 1 %, text of its own": {"method": "gwq", "calib": None},
}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="float model (default: the demo model)")
    parser.add_argument("--text", required=True, help="UTF-8 text to measure on")
    parser.add_argument("--calib", required=True, help="UTF-8 text to calibrate on, another one than --text")
    parser.add_argument("--windows", type=int, default=4, help="windows of 2048 tokens (default 4)")
    args = parser.parse_args()
    source, text = Path(args.model) if args.model else demo.source(), read_text(args.text)

    def measure(path: Path) -> float:
        return perplexity(load(path), text, limit_tokens=2048 * args.windows, progress=True)["perplexity"]

    rows = {"float": {"perplexity": measure(source)}}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in FORMS.items():
            out, start = Path(folder) / "model", time.perf_counter()
            quantize(source, out, **({"group_size": 64, "calib": None if options["method"] == "rtn" else args.calib} | options))
            seconds = time.perf_counter() - start
            rows[name] = {"perplexity": measure(out), "seconds": round(seconds, 1)}
            found = describe(open_checkpoint(out))
            rows[name] |= {key: found[key] for key in ("bits_per_weight", "outlier_share", "size_bytes")}
            for file in sorted(out.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            out.rmdir()
    base, rounded = rows["float"]["perplexity"], rows["RTN g64"]["perplexity"]
    print("\n| form | bits per weight | perplexity | closed | seconds |\n|---|---|---|---|---|")
    for name, row in rows.items():
        row["closed"] = (rounded - row["perplexity"]) / (rounded - base)
        bits, seconds = (f"{row[key]:.{digits}f}" if key in row else "–" for key, digits in (("bits_per_weight", 3), ("seconds", 0)))
        closed = "" if name in ("float", "RTN g64") else f"{100 * row['closed']:.0f} %"
        print(f"| {name} | {bits} | {row['perplexity']:.3f} | {closed} | {seconds} |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {"model": source.name, "windows": args.windows, "cpu": cpu_name(), "commit": commit, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"accuracy-{time.strftime('%Y-%m-%d')}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{file}")


if __name__ == "__main__":
    main()
