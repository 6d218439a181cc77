"""What accuracy costs, drawn: bits per weight against perplexity. Needs matplotlib, which nothing else here does."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

KINDS = (".png", ".svg", ".pdf")


def require(file: str | Path) -> Path:
    """Raise ValueError if a plot could not be drawn or not be written, before the hours that its numbers may take."""
    path = Path(file)
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"{file}: a plot's name ends in {', '.join(KINDS)}")
    if not path.parent.is_dir():
        raise ValueError(f"{file}: the directory {path.parent} does not exist")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib, which is not installed: pip install matplotlib")
    return path


def pareto(points: Sequence[tuple[str, float, float]], file: str | Path, title: str = "", base: float | None = None) -> None:
    """Draw (name, bits per weight, perplexity) of each model; `base`, the float model's perplexity, is a line.

    Those that no other beats in both are joined: what lies above that line pays bits for nothing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panel = figure.subplots()
    front: list[tuple[str, float, float]] = []
    for point in sorted(points, key=lambda p: p[1:]):
        if not front or point[2] < front[-1][2]:
            front.append(point)
    panel.plot([p[1] for p in front], [p[2] for p in front], color="#c4432b", linewidth=1, zorder=1)
    for point in points:
        panel.scatter(*point[1:], s=28, color="#c4432b" if point in front else "#8a97a6", zorder=2)
    if base is not None:
        panel.axhline(base, color="black", linewidth=0.8, linestyle=":")
        panel.annotate("float", (1, base), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=7, ha="right")
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:.4g}")
    panel.yaxis.set_minor_formatter("{x:.3g}")
    panel.tick_params(labelsize=8, which="both")
    panel.set_xlabel("bits per weight, with scales, zeros, outliers and their indices", fontsize=9)
    panel.set_ylabel("perplexity (log scale)", fontsize=9)
    panel.set_title(title, fontsize=9)
    panel.margins(x=0.12)
    panel.spines[["top", "right"]].set_visible(False)
    _name(panel, front + [p for p in points if p not in front])
    figure.savefig(file, dpi=100)


def _name(panel, points: Sequence[tuple[str, float, float]]) -> None:
    """Write the names beside the points, the first ones' first, where they cover no other; one that has no room goes without."""
    figure, taken = panel.figure, []
    figure.draw_without_rendering()  # what is where is known from now on
    figure.set_layout_engine("none")
    for name, bits, perplexity in points:
        for x, y in ((5, 4), (5, -9), (-5, 4), (-5, -9), (5, 11), (-5, 11)):
            side = "left" if x > 0 else "right"
            text = panel.annotate(name, (bits, perplexity), (x, y), textcoords="offset points", fontsize=7, ha=side)
            box = text.get_window_extent()
            if box.x0 >= 0 and box.x1 <= figure.bbox.x1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
