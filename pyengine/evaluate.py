"""How good a model is: perplexity on a text, accuracy on multiple-choice questions."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .engine import Engine
from .files import read_text


def token_losses(engine: Engine, ids: list[int]) -> Tensor:
    """−log p of every token of one window after the first, f32[len(ids) − 1]."""
    target, losses, at = torch.tensor(ids[1:]), [], 0
    for logits in engine.logit_chunks(ids):
        part = target[at : at + logits.shape[0]]
        losses.append(F.cross_entropy(logits[: len(part)], part, reduction="none"))
        at += logits.shape[0]
    return torch.cat(losses)


def perplexity(engine: Engine, text: str, context: int = 2048, limit_tokens: int | None = None, progress: bool = False) -> dict:
    """exp of the mean −log p over non-overlapping windows of `context` tokens, each predicting all its tokens but the first.

    The text is tokenised as a whole, without a BOS unless the model's tokenizer adds one; the last, shorter window counts too.
    Returns {"perplexity", "nll", "tokens", "tokens_per_s", "losses": f32[tokens]}; tokens are those predicted.
    """
    if limit_tokens is not None and limit_tokens < 2:
        raise ValueError(f"limit_tokens is {limit_tokens}, expected at least 2")
    if context < 2 or context > engine.context:
        raise ValueError(f"context is {context}, expected 2 to {engine.context}")
    ids = engine.tokenizer.encode(text)[:limit_tokens]
    windows = [ids[i : i + context] for i in range(0, len(ids), context)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise ValueError(f"the text has {len(ids)} tokens, perplexity needs at least 2")
    start = time.perf_counter()
    losses = [token_losses(engine, w) for w in tqdm(windows, desc="eval", unit="window", disable=not progress, delay=2)]
    seconds = time.perf_counter() - start
    losses = torch.cat(losses)
    nll = losses.double().mean().item()
    tokens = losses.numel()
    return {"perplexity": math.exp(nll), "nll": nll, "tokens": tokens, "tokens_per_s": tokens / seconds, "losses": losses}


def read_task(path: str | Path) -> list[dict]:
    """Questions {"context", "choices", "answer"} of a JSONL file; raises ValueError with the line that is not one."""
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            choices = item["choices"]
            if not (isinstance(item["context"], str) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)):
                raise ValueError("context must be a string, choices at least two strings that are not empty")
            if item["answer"] not in range(len(choices)):
                raise ValueError(f"answer {item['answer']!r} is not an index of {len(choices)} choices")
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}, line {number}: {e}") from e
        items.append(item)
    if not items:
        raise ValueError(f"{path} has no questions")
    return items


def multiple_choice(engine: Engine, items: list[dict], progress: bool = False) -> dict:
    """Share of questions whose likeliest choice is right: {"acc", "acc_norm", "n"}; acc_norm divides log p by the choice's bytes."""
    right = right_norm = 0
    for item in tqdm(items, desc="eval", unit="question", disable=not progress, delay=2):
        context = engine.tokenizer.encode(item["context"])
        scores = []
        for choice in item["choices"]:
            ids = engine.tokenizer.encode(item["context"] + choice)
            if len(ids) < 2:
                raise ValueError(f"the choice {choice!r} after {item['context']!r} is a single token: there is nothing to predict it from")
            shared = next((i for i, (a, b) in enumerate(zip(context, ids)) if a != b), min(len(context), len(ids)))
            shared = max(1, min(shared, len(ids) - 1))
            scores.append(-token_losses(engine, ids)[shared - 1 :].double().sum().item())
        by_byte = [s / len(c.encode()) for s, c in zip(scores, item["choices"])]
        right += scores.index(max(scores)) == item["answer"]
        right_norm += by_byte.index(max(by_byte)) == item["answer"]
    return {"acc": right / len(items), "acc_norm": right_norm / len(items), "n": len(items)}
