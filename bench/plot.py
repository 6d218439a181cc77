"""The plot of compare.py's results: tokens/s of everybody, a panel for each model and phase."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def best(rows: dict[str, dict], phase: str) -> list[tuple[str, float]]:
    """The fastest variant of each library, slowest first, as (name, tokens/s)."""
    fastest: dict[str, tuple[str, float]] = {}
    for name, row in rows.items():
        library, variant = name.split(" ", 1)
        speed = row.get(f"{phase}_tok_s", 0.0)
        if speed > fastest.get(library, ("", 0.0))[1]:
            fastest[library] = (f"{library}\n{'' if library == 'pyengine' else variant}".strip(), speed)
    return sorted(fastest.values(), key=lambda item: item[1])


def draw(results: dict, file: Path) -> None:
    models = results["models"]
    figure, panels = plt.subplots(len(models), 2, figsize=(9, 0.6 + 2.4 * len(models)), squeeze=False, layout="constrained")
    for line, (model, data) in zip(panels, models.items()):
        for panel, phase in zip(line, ("decode", "prefill")):
            bars = best(data["rows"], phase)
            colors = ["#c4432b" if name.startswith("pyengine") else "#8a97a6" for name, _ in bars]
            drawn = panel.barh([name for name, _ in bars], [speed for _, speed in bars], color=colors)
            panel.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
            panel.set_title(f"{model}: {phase} {data[{'decode': 'decode', 'prefill': 'prompt'}[phase]]}, tokens/s", fontsize=9)
            panel.tick_params(labelsize=8)
            panel.margins(x=0.15)
            panel.spines[["top", "right"]].set_visible(False)
    machine = results["machine"]
    figure.suptitle(f"{machine['cpu']}, {next(iter(models.values()))['threads']} threads; the fastest variant of each library", fontsize=8)
    figure.savefig(file, dpi=90)
    plt.close(figure)
