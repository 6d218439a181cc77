"""Several models measured alike, against a reference or the first of them: what `pyengine eval` runs and prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from . import evaluate, tasks
from .engine import Engine
from .files import read_text
from .inspect import describe


@dataclass
class Measure:
    """What is measured of each model. `contexts` of None is one, of 2048 tokens or what the model holds."""

    text: str | None = None
    contexts: Sequence[int] | None = None
    limit_tokens: int | None = None
    questions: dict[str, list[dict]] = field(default_factory=dict)  # by the task's name
    prompts: Sequence[str] = ()
    max_new_tokens: int = 64
    progress: bool = False

    def __call__(self, engine: Engine, reference: Engine | None = None, baseline: dict[int, Tensor] | None = None) -> dict:
        """The numbers of one model: `evaluate.summary` flat, or under "contexts" where there are several; tasks by name; "drift".

        `baseline` holds by context the losses that differences are taken from. The first model that finds it empty fills it.
        """
        result: dict = {}
        if self.text is not None:
            texts = self._texts(engine, reference, baseline)
            result = next(iter(texts.values())) if len(texts) == 1 else {"contexts": {str(c): r for c, r in texts.items()}}
        for name, items in self.questions.items():
            result[name] = tasks.multiple_choice(engine, items, self.progress)
        if self.prompts and reference is not None:
            result["drift"] = evaluate.drift(engine, reference, self.prompts, self.max_new_tokens, self.progress)
        return result

    def _texts(self, engine: Engine, reference: Engine | None, baseline: dict[int, Tensor] | None) -> dict[int, dict]:
        if reference is not None:
            evaluate.require_same_vocabulary(engine, reference, self.text)
        found = {}
        for context in self.contexts or [min(2048, engine.context)]:
            windows = evaluate.text_windows(engine, self.text, context, self.limit_tokens)
            scores = evaluate.score(engine, windows, reference, self.progress)
            base = None if baseline is None else baseline.get(context)
            if base is not None and len(base) != len(scores.loss):
                raise ValueError(f"{len(scores.loss)} tokens cannot be compared with {len(base)}: the models cut the text into other tokens")
            found[context] = evaluate.summary(scores, base)
            if baseline is not None and base is None and reference is None:
                baseline[context] = scores.loss
        return found


def read_tasks(files: Sequence[str], limit: int | None = None) -> dict[str, list[dict]]:
    """Questions by the task's name, which is the file's without folder and ending. ValueError if two are called alike."""
    found: dict[str, list[dict]] = {}
    for file in files:
        name = Path(file).name.removesuffix(".jsonl")
        if name in found:
            raise ValueError(f"{file}: there is another task named {name!r}")
        found[name] = tasks.read_task(file)[:limit]
    return found


def read_prompts(file: str) -> list[str]:
    """The lines of a UTF-8 file that are not empty. ValueError where there are none."""
    prompts = [line for line in read_text(file).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{file} has no prompts, expected one a line")
    return prompts


def compare(models: Sequence[str], load: Callable[[str | None], Engine], measure: Measure, reference: Engine | None = None) -> dict:
    """{"reference", "rows"}: for each model its name, bits_per_weight (None where the source does not tell), size_bytes and what `measure` finds.

    One model at a time is in memory, and the reference. Without a reference differences are taken from the first model.
    """
    baseline: dict[int, Tensor] = {}
    rows = []
    for model in models:
        engine = load(model)
        checkpoint = engine.checkpoint
        size = sum(f.stat().st_size for f in checkpoint.files)
        bits = None if checkpoint.format == "gguf" else describe(checkpoint)["bits_per_weight"]
        checkpoint.release()
        rows.append({"model": model, "bits_per_weight": bits, "size_bytes": size, **measure(engine, reference, baseline)})
        del engine  # before its successor is loaded
    return {"reference": None if reference is None else str(reference.checkpoint.path), "rows": rows}


def lines(result: dict) -> list[str]:
    """What `Measure` found of one model, for a reader."""
    found = []
    texts = {f" at {c}": r for c, r in result["contexts"].items()} if "contexts" in result else {"": result} if "perplexity" in result else {}
    for at, r in texts.items():
        error = _number(r["nll_standard_error"], 5)
        speed = f"{r['tokens_per_s']:.0f} tokens/s"
        found.append(f"perplexity{at} {r['perplexity']:.4f} over {r['tokens']} tokens (nll {r['nll']:.5f} ± {error}), {speed}")
        if "kl" in r:
            difference = f"nll {r['nll_difference']:+.5f} ± {_number(r['nll_difference_standard_error'], 5)} against {r['reference_perplexity']:.4f}"
            found.append(f"  reference: {difference}, KL {r['kl']:.5f} ± {_number(r['kl_standard_error'], 5)}, same top-1 {100 * r['top1']:.2f} %")
    for name, r in result.items():
        if isinstance(r, dict) and "acc" in r:
            acc, norm = (f"{key} {r[key]:.3f} ± {_number(r[key + '_stderr'], 3)}" for key in ("acc", "acc_norm"))
            found.append(f"{name}: {acc}, {norm}, {r['n']} questions" + (f", {r['cut']} cut to the model's context" if "cut" in r else ""))
    if "drift" in result:
        r = result["drift"]
        found.append(
            f"drift: {100 * r['exact_match']:.0f} % of {r['prompts']} prompts continued alike, "
            f"first difference after {r['first_divergence']:.1f} tokens, {r['length']:.1f} tokens long (reference {r['reference_length']:.1f})"
        )
    return found


def table(result: dict, names: Sequence[str]) -> list[str]:
    """The lines of `compare`'s result as a table; `names` are those of the tasks."""
    rows = result["rows"]
    contexts = list(rows[0]["contexts"]) if "contexts" in rows[0] else [None] if "perplexity" in rows[0] else []
    head = ["model", "bits per weight", "MB"]
    body = [[Path(r["model"]).name, _number(r["bits_per_weight"], 3), f"{r['size_bytes'] / 1e6:.1f}"] for r in rows]
    first = ["reference: " + Path(result["reference"]).name, "–", "–"] if result["reference"] is not None else None
    for context in contexts:
        texts = [r if context is None else r["contexts"][context] for r in rows]
        at = "" if context is None else f" at {context}"
        head += [f"perplexity{at}", "Δ nll ± SE"] + (["KL", "same top-1"] if "kl" in texts[0] else [])
        for line, t in zip(body, texts):
            difference = "–"
            if "nll_difference" in t:
                difference = f"{t['nll_difference']:+.4f} ± {_number(t['nll_difference_standard_error'], 4)}"
            line += [f"{t['perplexity']:.3f}", difference] + ([f"{t['kl']:.4f}", f"{100 * t['top1']:.1f} %"] if "kl" in t else [])
        if first is not None:
            first += [f"{texts[0]['reference_perplexity']:.3f}", "–", "–", "–"]
    for name in names:
        head += [f"{name} acc", "acc_norm"]
        for line, row in zip(body, rows):
            line += [f"{row[name][key]:.3f} ± {_number(row[name][key + '_stderr'], 3)}" for key in ("acc", "acc_norm")]
    if "drift" in rows[0]:
        head += ["same continuation", "tokens to the first difference"]
        for line, row in zip(body, rows):
            line += [f"{100 * row['drift']['exact_match']:.0f} %", f"{row['drift']['first_divergence']:.1f}"]
    if first is not None:
        body.insert(0, first + ["–"] * (len(head) - len(first)))
    return [_line(head), "|" + "---|" * len(head), *map(_line, body)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def points(result: dict) -> tuple[list[tuple[str, float, float]], float | None]:
    """(name, bits per weight, perplexity) of the rows that have them, and the float model's perplexity: what `plot.pareto` draws.

    Where there are several contexts it is the longest's.
    """
    found, base = [], None
    for row in result["rows"]:
        text = row["contexts"][max(row["contexts"], key=int)] if "contexts" in row else row
        base = text.get("reference_perplexity", base)
        if row["bits_per_weight"] is not None:
            found.append((Path(row["model"]).name, row["bits_per_weight"], text["perplexity"]))
    return found, base
