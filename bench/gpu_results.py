"""Puts the parts that bench/h200.sh has measured into one JSON file, and prints the table.

python bench/gpu_results.py FOLDER OUT.json SUMMARY…     FOLDER/*.json: outputs of `qbench --device cuda --json`; FOLDER/peers.json: of peers/gpu.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(rows: list[dict], peers: list[dict]) -> list[str]:
    """A line for each kernel, layer and number of tokens; what a peer needs for the same shape stands beside it."""
    lines = [f"{'weights':<14}{'layer':<9}{'m':>6}  {'kernel':<22}{'us':>9}{'of peak':>9}{'fp16 us':>9}{'fp16 x':>8}  peers"]
    for row in rows:
        if "k" not in row:
            continue
        weights = f"W{row['bits']} {100 * row['outliers']:g} %"
        same = [f"{p['peer']} {p['us']:.1f}" for p in peers if all(p[key] == row[key] for key in ("m", "n", "k", "bits"))]
        peak = f"{100 * row['of_peak']:.0f} %" if row["of_peak"] else "-"
        fp16, times = (f"{row['fp16_us']:.1f}", f"{row['fp16_us'] / row['us']:.2f}") if row["fp16_us"] else ("-", "-")
        line = f"{weights:<14}{row['layer']:<9}{row['m']:>6}  {row['kernel']:<22}{row['us']:>9.1f}{peak:>9}{fp16:>9}{times:>8}"
        lines.append(f"{line}  {', '.join(same)}")
    return lines


def main(folder: str, out: str, *summary: str) -> None:
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    peers = parts.pop("peers", None)
    rows = [row for part in parts.values() for row in part["rows"]]
    machines = [part["machine"] for part in parts.values()]  # ceilings of each run: how far they differ says how quiet the machine was
    result = {"machines": machines, "rows": rows, "peers": peers, "phases": list(summary)}
    partial = Path(out + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)
    print("\n".join(table(rows, peers["rows"] if peers else [])))


if __name__ == "__main__":
    main(*sys.argv[1:])
