"""Where the weights that stay FP16 sit in a checkpoint: by kind of linear, by block, and how they crowd into rows and columns."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import models
from .checkpoint import write_file
from .formats import Checkpoint
from .loader import weight
from .qtensor import QTensor

POINTS = 101  # of the curves: the fullest 0 %, 1 % … 100 % of the rows or columns


def outlier_report(checkpoint: Checkpoint, folder: str | os.PathLike | None = None) -> dict:
    """What `measure` says, also written to outliers.json in the folder `folder`, and drawn in outliers.png where matplotlib is installed."""
    found = measure(checkpoint)
    if folder is not None:
        write_file(Path(folder) / "outliers.json", ((json.dumps(found, indent=2) + "\n").encode(),))
        try:
            import matplotlib
        except ImportError:
            print("outliers.png is not drawn: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
            return found
        matplotlib.use("Agg")
        if found:
            draw(found, Path(folder) / "outliers.png")
    return found


def measure(checkpoint: Checkpoint) -> dict:
    """Shares are of the weights, in `rows` and `columns` of the outliers. Empty if nothing is kept in FP16.

    share; by_linear {name inside a block: share}; by_block [share]; blocks [{name: share}]; rows and columns, each {fullest_1_percent: of the
    outliers of each matrix, those in its fullest 1 % of rows; empty: share of rows without any; curve: what the fullest 0 … 100 % hold}.
    """
    arch = models.find(checkpoint.config)
    c = arch.Config.from_dict(checkpoint.config)
    counts: list[dict[str, int]] = []
    lines = {"rows": Crowding(), "columns": Crowding()}
    for i in range(c.num_hidden_layers):
        counts.append({})
        for name in arch.LINEARS:
            q = weight(checkpoint, f"model.layers.{i}.{name}", *c.linear_shape(name), c.has_bias(name))
            kept = kept_by_line(q) if isinstance(q, QTensor) else None
            counts[-1][name] = int(kept[0].sum()) if kept else 0
            if counts[-1][name]:
                for line, found in zip(lines.values(), kept, strict=True):
                    line.add(found)
    total, sizes = sum(sum(of.values()) for of in counts), {name: n * k for name, (n, k) in ((name, c.linear_shape(name)) for name in arch.LINEARS)}
    if not total:
        return {}
    block = sum(sizes.values())
    return {
        "share": total / (block * len(counts)),
        "by_linear": {name: sum(of[name] for of in counts) / (size * len(counts)) for name, size in sizes.items()},
        "by_block": [sum(of.values()) / block for of in counts],
        "blocks": [{name: of[name] / size for name, size in sizes.items()} for of in counts],
        **{name: line.summary() for name, line in lines.items()},
    }


def kept_by_line(q: QTensor) -> tuple[Tensor, Tensor]:
    """How many weights of each row, f64[n], and of each column, f64[k], are FP16."""
    rows, columns = torch.full((q.n,), float(q.columns), dtype=torch.float64), torch.zeros(q.k, dtype=torch.float64)
    if q.columns:
        columns[q.column_index.long()] = float(q.n)
    if q.outliers:
        rows += q.outlier_row.diff()
        columns += torch.bincount(q.outlier_col.to(torch.int64), minlength=q.k)
    return rows, columns


class Crowding:
    """The mean over matrices of how their outliers share out on lines (rows or columns), each matrix weighing what it has of them."""

    def __init__(self) -> None:
        self.outliers, self.lines, self.empty, self.curve = 0.0, 0, 0, torch.zeros(POINTS, dtype=torch.float64)

    def add(self, counts: Tensor) -> None:
        """counts f64[lines] of one matrix."""
        held = torch.cat((torch.zeros(1, dtype=torch.float64), counts.sort(descending=True).values.cumsum(0)))
        at = torch.linspace(0, 1, POINTS, dtype=torch.float64) * len(counts)
        below = at.floor().long().clamp(max=len(counts) - 1)
        self.curve += held[below] + (held[below + 1] - held[below]) * (at - below)
        self.outliers, self.lines, self.empty = self.outliers + float(held[-1]), self.lines + len(counts), self.empty + int((counts == 0).sum())

    def summary(self) -> dict:
        curve = (self.curve / self.outliers).tolist()
        return {"fullest_1_percent": curve[1], "empty": self.empty / self.lines, "curve": curve}


def draw(report: dict, file: Path) -> None:
    """The share of every linear as a map, and the curves of rows and columns."""
    from matplotlib import pyplot as plt

    names = list(report["by_linear"])
    figure, (share, curve) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(1.4, 1))
    image = share.imshow([[100 * block[name] for block in report["blocks"]] for name in names], aspect="auto", cmap="viridis", vmin=0)
    share.set_yticks(range(len(names)), [name.rsplit(".", 1)[-1] for name in names])
    share.set_xlabel("block")
    share.set_title(f"FP16 weights, % of each matrix ({100 * report['share']:.2f} % of all)")
    figure.colorbar(image, ax=share)
    for line, colour in (("columns", "tab:blue"), ("rows", "tab:orange")):
        curve.plot(range(POINTS), [100 * v for v in report[line]["curve"]], color=colour, label=line)
    curve.plot((0, 100), (0, 100), color="grey", linewidth=0.8, linestyle="--", label="spread evenly")
    curve.set_xlabel("fullest % of rows or columns")
    curve.set_ylabel("hold % of the FP16 weights")
    curve.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
