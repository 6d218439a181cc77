"""Multiple-choice questions: which of several continuations of a context the model finds likeliest.

The context of a question runs once; its keys and values are copied to a slot for each choice, and the choices of several questions
then go through the model together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .cache import Batch, KVCache
from .engine import CHUNK, Engine
from .evaluate import ROWS, common_prefix
from .files import read_text
from .tokenizer import Tokenizer

SLOTS = 16  # choices that run together: rows enough to keep kernels busy, and a KV cache that stays small


def read_task(path: str | Path) -> list[dict]:
    """Questions {"context", "choices", "answer"} of a JSONL file; raises ValueError with the line that is not one."""
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            choices = item["choices"]
            texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
            if not (texts and isinstance(item["context"], str)):
                raise ValueError("context must be a string, choices at least two strings that are not empty")
            if type(item["answer"]) is not int or item["answer"] not in range(len(choices)):
                raise ValueError(f"answer {item['answer']!r} is not an index of {len(choices)} choices")
        except KeyError as e:
            raise ValueError(f"{path}, line {number}: {e} is missing") from e
        except (ValueError, TypeError, RecursionError) as e:
            raise ValueError(f"{path}, line {number}: {e}") from e
        items.append(item)
    if not items:
        raise ValueError(f"{path} has no questions")
    return items


def multiple_choice(engine: Engine, items: Sequence[dict], progress: bool = False) -> dict:
    """Share of questions whose likeliest choice is right: {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"}.

    acc compares log p of the choices, acc_norm log p by UTF-8 byte of the choice without the space that parts it from the context; the first
    of equals counts. This is what lm-eval does with a choice's characters. A question that is too long loses its beginning, and "cut"
    counts those.
    """
    right, right_norm, cut = [], [], []
    losses = _losses(engine, _groups(engine, items, cut))
    for item in tqdm(items, desc="eval", unit="question", disable=not progress, delay=2):
        scores = [-next(losses) for _ in item["choices"]]
        by_byte = [s / max(1, len(c.removeprefix(" ").encode())) for s, c in zip(scores, item["choices"])]
        right.append(scores.index(max(scores)) == item["answer"])
        right_norm.append(by_byte.index(max(by_byte)) == item["answer"])
    result = {}
    for name, values in (("acc", right), ("acc_norm", right_norm)):
        share, n = sum(values) / len(values), len(values)
        result |= {name: share, f"{name}_stderr": (share * (1 - share) / (n - 1)) ** 0.5 if n > 1 else None}
    return result | {"n": len(items)} | ({"cut": len(cut)} if cut else {})


@dataclass
class Group:
    """Token sequences that begin alike. Of each, the tokens from `start` on are scored; the first `shared` are the same in all."""

    sequences: list[list[int]]
    start: list[int]
    shared: int = field(init=False)

    def __post_init__(self) -> None:
        self.shared = min(*self.start, *(common_prefix(self.sequences[0], s) for s in self.sequences))


def _sequences(tokenizer: Tokenizer, context: str, choices: Sequence[str], longest: int) -> tuple[list[list[int]], list[int], bool]:
    """(tokens of the context with each choice, where each choice begins, whether the context had to be cut).

    A choice begins at the first token that the context alone does not have there: one that grows together with the context's end is scored
    whole.
    """
    alone = tokenizer.encode(context)
    sequences = [tokenizer.encode(context + choice) for choice in choices]
    if not all(sequences):
        raise ValueError(f"a choice of {list(choices)} after {context!r} has no tokens")
    start = [min(common_prefix(alone, s), len(s) - 1) for s in sequences]
    if min(start) < 1:  # nothing to predict the first token from
        ends = [tokenizer.bos_id] if tokenizer.bos_id is not None else sorted(tokenizer.eos_ids)[:1]
        if not ends:
            raise ValueError(f"the choice {choices[0]!r} after {context!r} has nothing to be predicted from")
        sequences, start = [ends + s for s in sequences], [i + 1 for i in start]
    over = max(len(s) - longest for s in sequences)
    if over > 0:  # by the same for all, so that they still begin alike
        if min(start) - over < 1:
            tokens = max(map(len, sequences)) - min(start)
            raise ValueError(f"a choice of {tokens} tokens after {context[:40]!r} does not fit the model's context of {longest}")
        sequences, start = [s[over:] for s in sequences], [i - over for i in start]
    return sequences, start, over > 0


def _groups(engine: Engine, items: Sequence[dict], cut: list[dict]) -> Iterator[Group]:
    """Groups of at most SLOTS sequences, one or more a question; `cut` collects the questions that lose their beginning."""
    for item in items:
        sequences, start, over = _sequences(engine.tokenizer, item["context"], item["choices"], engine.context)
        if over:
            cut.append(item)
        for i in range(0, len(start), SLOTS):
            yield Group(sequences[i : i + SLOTS], start[i : i + SLOTS])


def _losses(engine: Engine, groups: Iterable[Group]) -> Iterator[float]:
    """−log p of the scored tokens of every sequence, as many groups at a time as SLOTS allow."""
    batch: list[Group] = []
    for group in groups:
        if sum(len(g.start) for g in batch) + len(group.start) > SLOTS:
            yield from choice_losses(engine, batch)
            batch = []
        batch.append(group)
    yield from choice_losses(engine, batch)


def choice_losses(engine: Engine, groups: Sequence[Group]) -> list[float]:
    """−log p of the scored tokens of every sequence of every group, in their order."""
    engine.claim()
    cache = engine.cache_for(SLOTS, max(len(s) for g in groups for s in g.sequences))
    first = [sum(len(g.start) for g in groups[:i]) for i in range(len(groups))]
    losses = torch.zeros(cache.slots, dtype=torch.float64)
    # The last row of what is shared predicts the first scored token of every sequence that begins to differ right there.
    prefixes = []
    for g, slot in zip(groups, first):
        prefixes += [_Row(token, slot, position, []) for position, token in enumerate(g.sequences[0][: g.shared])]
        prefixes[-1].predicts += [(slot + j, s[g.shared]) for j, s in enumerate(g.sequences) if g.start[j] == g.shared]
    _run(engine, cache, prefixes, losses)
    for g, slot in zip(groups, first):
        cache.copy(slot, slice(slot + 1, slot + len(g.start)), g.shared)
    rest = [
        _Row(s[position], slot + j, position, [(slot + j, s[position + 1])] if position + 1 >= g.start[j] else [])
        for g, slot in zip(groups, first) for j, s in enumerate(g.sequences) for position in range(g.shared, len(s) - 1)
    ]  # fmt: skip
    _run(engine, cache, rest, losses)
    return losses[: sum(len(g.start) for g in groups)].tolist()


@dataclass
class _Row:
    """A token on its way through the model, and for whom it predicts what: (sequence, token)."""

    token: int
    slot: int
    position: int
    predicts: list[tuple[int, int]]


def _run(engine: Engine, cache: KVCache, rows: Sequence[_Row], losses: Tensor) -> None:
    """Add what the rows' predictions lose to losses f64[slots]."""
    for begin in range(0, len(rows), CHUNK):
        part = rows[begin : begin + CHUNK]
        wanted = [i for i, row in enumerate(part) if row.predicts]
        batch = Batch.of([r.token for r in part], [r.slot for r in part], [r.position for r in part], cache, wanted)
        logits = engine.model(batch, cache)
        for at in range(0, len(wanted), ROWS):
            p = logits[at : at + ROWS].float().log_softmax(1)
            pairs = [(row, *pair) for row, i in enumerate(wanted[at : at + ROWS]) for pair in part[i].predicts]
            row, sequence, token = torch.tensor(pairs).T
            losses.index_add_(0, sequence, -p[row.to(p.device), token.to(p.device)].double().cpu())
