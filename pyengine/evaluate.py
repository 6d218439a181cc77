"""How good a model is on a text: perplexity, and how far it has drifted from a reference model, in probabilities and in what it writes."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .engine import Engine

# Standard errors come from pieces of so many successive tokens: what is hard about one token is often hard about the next, so tokens are
# no independent samples, and a window of 2048 would leave too few.
PIECE = 256
ROWS = 64  # whose probabilities are in memory at once: 40 MB at a vocabulary of 150,000
PROMPTS = 8  # that are continued together


@dataclass
class Scores:
    """What is known of every predicted token, in the order of the text; the reference's are None where there is none.

    loss            f32[tokens]: −log p of the token that stands there
    reference_loss  f32[tokens]: the same by the reference
    divergence      f32[tokens]: KL(reference ‖ model) over the vocabulary, in nats
    same            bool[tokens]: both models' likeliest token is the same
    seconds         that the model took, without the reference
    """

    loss: Tensor
    seconds: float
    reference_loss: Tensor | None = None
    divergence: Tensor | None = None
    same: Tensor | None = None


def text_windows(engine: Engine, text: str, context: int = 2048, limit_tokens: int | None = None) -> list[list[int]]:
    """The text's tokens in windows of `context` that do not overlap; the last may be shorter, but predicts something.

    The text is tokenised as a whole, without a BOS unless the model's tokenizer adds one. ValueError for limits that make no sense.
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
    return windows


def score(engine: Engine, windows: Sequence[list[int]], reference: Engine | None = None, progress: bool = False) -> Scores:
    """Run the windows through the model, and through the reference in step with it: no more than a chunk of logits is ever held."""
    parts: list[tuple[Tensor, ...]] = []
    seconds = 0.0
    for ids in tqdm(windows, desc="eval", unit="window", disable=not progress, delay=2):
        target, at = torch.tensor(ids[1:]), 0
        ours, theirs = engine.logit_chunks(ids), reference.logit_chunks(ids) if reference else itertools.repeat(None)
        while at < len(target):
            start = time.perf_counter()
            logits = next(ours)
            seconds += time.perf_counter() - start
            other = next(theirs)
            for i in range(0, min(len(logits), len(target) - at), ROWS):
                rows = target[at + i : at + i + ROWS]
                parts.append(_score_rows(logits[i : i + len(rows)], rows, None if other is None else other[i : i + len(rows)]))
            at += len(logits)
    columns = [torch.cat(column) for column in zip(*parts)]
    return Scores(columns[0], seconds, *columns[1:])


def _score_rows(logits: Tensor, target: Tensor, reference: Tensor | None) -> tuple[Tensor, ...]:
    """(loss,) of each row, or (loss, the reference's loss, divergence, same): logits[rows, vocab], target i64[rows]."""
    p, target = logits.float().log_softmax(1), target[:, None].to(logits.device)
    loss = -p.gather(1, target)[:, 0].cpu()
    if reference is None:
        return (loss,)
    q = reference.float().log_softmax(1)
    divergence = (q.exp() * (q - p)).sum(1)
    return loss, -q.gather(1, target)[:, 0].cpu(), divergence.cpu(), (p.argmax(1) == q.argmax(1)).cpu()


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """Mean of values[tokens] and its standard error, from the sums of pieces; None where there is but one piece."""
    values = values.double()
    mean = values.mean()
    sums = torch.stack([(piece - mean).sum() for piece in values.split(PIECE)])
    if len(sums) == 1:
        return mean.item(), None
    return mean.item(), (len(sums) / (len(sums) - 1) * sums.square().sum()).sqrt().item() / len(values)


def summary(scores: Scores, baseline: Tensor | None = None) -> dict:
    """What a table shows of scores: perplexity, nll and its standard error, tokens, tokens_per_s.

    `baseline` f32[tokens] are losses on the same tokens, the reference's if None: nll_difference and its standard error are paired, token by
    token, and so far smaller than the errors of the two. With a reference kl, its standard error, and top1, the share of the same likeliest token.
    """
    nll, error = mean_and_error(scores.loss)
    perplexity, tokens = math.exp(nll), len(scores.loss)
    result = {"perplexity": perplexity, "perplexity_standard_error": None if error is None else perplexity * error, "nll": nll}
    result |= {"nll_standard_error": error, "tokens": tokens, "tokens_per_s": tokens / scores.seconds}
    baseline = scores.reference_loss if baseline is None else baseline
    if baseline is not None:
        difference, error = mean_and_error(scores.loss - baseline)
        result |= {"nll_difference": difference, "nll_difference_standard_error": error}
    if scores.divergence is not None:
        kl, error = mean_and_error(scores.divergence)
        reference = math.exp(mean_and_error(scores.reference_loss)[0])
        result |= {"kl": kl, "kl_standard_error": error, "top1": scores.same.double().mean().item(), "reference_perplexity": reference}
    return result


def perplexity(engine: Engine, text: str, context: int = 2048, limit_tokens: int | None = None, progress: bool = False) -> dict:
    """exp of the mean −log p over the windows of `text_windows`, each predicting all its tokens but the first.

    Returns `summary` with "losses", f32[tokens]; tokens are those predicted.
    """
    scores = score(engine, text_windows(engine, text, context, limit_tokens), progress=progress)
    return summary(scores) | {"losses": scores.loss}


def require_same_vocabulary(engine: Engine, reference: Engine, text: str) -> None:
    """Raise ValueError if two models cut the text into other tokens or know another number of them: their losses do not compare."""
    sizes = [e.model.config.vocab_size for e in (engine, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"a vocabulary of {sizes[0]} tokens cannot be compared with the reference's of {sizes[1]}")
    if engine.tokenizer.encode(text) != reference.tokenizer.encode(text):
        raise ValueError("the reference cuts the text into other tokens, so the two cannot be compared")


def drift(engine: Engine, reference: Engine, prompts: Sequence[str | list[int]], max_new_tokens: int = 64, progress: bool = False) -> dict:
    """How long greedy continuations stay the reference's.

    exact_match is the share of prompts continued by the very same tokens; first_divergences, one a prompt, count the tokens before the first
    that differs (all of them where none does), first_divergence is their mean; length and reference_length are mean lengths in tokens.
    """
    ours, theirs = [], []
    parts = [list(prompts[i : i + PROMPTS]) for i in range(0, len(prompts), PROMPTS)]
    for part in tqdm(parts, desc="drift", unit="batch", disable=not progress, delay=2):
        ours += [c.tokens for c in engine.generate(part, max_new_tokens)]
        theirs += [c.tokens for c in reference.generate(part, max_new_tokens)]
    common = [common_prefix(a, b) for a, b in zip(ours, theirs)]
    return {
        "prompts": len(prompts),
        "exact_match": sum(a == b for a, b in zip(ours, theirs)) / len(prompts),
        "first_divergence": statistics.mean(common),
        "length": statistics.mean(map(len, ours)),
        "reference_length": statistics.mean(map(len, theirs)),
        "first_divergences": common,
    }


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
