"""`pyengine.generate`: text from prompts in one call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from .engine import Engine
from .loader import load

_cached_load = functools.lru_cache(maxsize=1)(load)


def generate(prompts: str | Sequence[str], model: str | Path | Engine | None = None, max_new_tokens: int = 128, **sampling) -> str | list[str]:
    """Complete one prompt (returns a string) or several at once (returns a list).

    model: what `pyengine.load` takes, or what it returned; None is the demo model. The last model is kept in memory for the next call.
    sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed, stop; greedy without them.
    """
    engine = model if isinstance(model, Engine) else _cached_load(None if model is None else str(model))
    texts = [c.text for c in engine.generate(prompts, max_new_tokens, **sampling)]
    return texts[0] if isinstance(prompts, str) else texts
