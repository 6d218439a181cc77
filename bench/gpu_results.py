"""Puts the parts that bench/h200.sh has measured into one JSON file, and prints the table.

python bench/gpu_results.py FOLDER OUT.json SUMMARY…     FOLDER/*.json: outputs of `qbench --device cuda --json`; FOLDER/peers.json: of peers/gpu.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def against(row: dict, other: str) -> str:
    """The time of something else, and how many times the kernel's it is."""
    return f"{row[other]:>9.1f}{row[other] / row['us']:>7.2f}" if row.get(other) else f"{'-':>9}{'-':>7}"


def line(row: dict, what: str, others: tuple[str, ...]) -> str:
    peak = f"{100 * row['of_peak']:.0f} %" if row["of_peak"] else "-"
    own = f"{what:<14}{row['layer']:<9}{row['m']:>6}  {row['kernel']:<22}{row['us']:>9.1f}{peak:>9}"
    return own + "".join(against(row, other) for other in others)


def table(rows: list[dict], peers: list[dict]) -> list[str]:
    """A line for each kernel, layer and number of tokens: of linears beside cuBLAS's products and what a peer needs for the same shape, of
    transforms beside the same in a launch for each step."""
    head = f"{'layer':<9}{'m':>6}  {'kernel':<22}{'us':>9}{'of peak':>9}"
    lines = [f"{'weights':<14}{head}{'fp16 us':>9}{'x':>7}{'int8 us':>9}{'x':>7}  peers"]
    for row in (row for row in rows if row["op"] == "qlinear"):
        act = row.get("act_bits", 16)
        weights = f"W{row['bits']}{'' if act == 16 else f'A{act}'} {100 * row['outliers']:g} %"
        weights += f" c{100 * row['columns']:g} %" if row.get("columns") else f" g{row['group']}" if act < 16 and row["group"] < row["k"] else ""
        same = [f"{p['peer']} {p['us']:.1f}" for p in peers if act == 16 and all(p[key] == row[key] for key in ("m", "n", "k", "bits"))]
        lines.append(f"{line(row, weights, ('fp16_us', 'int8_us'))}  {', '.join(same)}")
    others = [row for row in rows if row["op"] in ("transform", "attention")]
    if others:
        lines.append(f"{'op':<14}{head}{'apart us':>9}{'x':>7}")
    for row in others:
        codes = f" a{row['act_bits']}" if "act_bits" in row else ""
        lines.append(line(row, row["op"] + codes, ("apart_us",)))
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
