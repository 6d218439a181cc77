"""Choosing the next token from logits: greedy, or drawn after penalty, temperature, top-k, top-p and min-p, in this order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 do nothing.

    seed: None draws anew every time; a number gives the same tokens every time, for each prompt of a batch its own.
    stop: strings that end a text; they are cut off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        rules = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "stop": (all(self.stop), "strings that are not empty"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")


def filtered(logits: Tensor, s: Sampling) -> Tensor:
    """Logits f32[vocab] over temperature, with −inf where top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) rule a token out."""
    logits = (logits - logits.max()) / s.temperature  # so that a tiny temperature gives −inf and 0, not inf
    if 0 < s.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(s.top_k).values[-1], -torch.inf)
    if s.top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(0)
        # A token stays while those before it hold less than top_p; the first one always does.
        out = (p.cumsum(0) - p) >= s.top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(0, index, out), -torch.inf)
    if s.min_p > 0:
        p = logits.softmax(0)
        logits = logits.masked_fill(p < s.min_p * p.max(), -torch.inf)
    return logits


class Sampler:
    """Chooses the tokens of one text. `seen` holds the prompt's tokens and those chosen so far, for the repetition penalty."""

    def __init__(self, sampling: Sampling, seen: list[int], index: int = 0):
        self.sampling = sampling
        self.seen = torch.tensor(sorted(set(seen)), dtype=torch.int64)
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            # The generator looks at 32 bits of its seed alone.
            digest = hashlib.blake2b(f"{sampling.seed}/{index}".encode(), digest_size=4).digest()
            self.generator.manual_seed(int.from_bytes(digest, "little"))

    def choose(self, logits: Tensor) -> int:
        """logits f32[vocab] → token."""
        s = self.sampling
        if s.repetition_penalty != 1:
            # Keskar et al. 2019 (CTRL): positive logits are divided by the penalty, negative ones multiplied.
            old = logits[self.seen]
            logits = logits.clone()
            logits[self.seen] = torch.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
        if s.temperature == 0:
            token = int(logits.argmax())
        else:
            p = filtered(logits, s).softmax(0)
            # Exponential race: the least e/p is a draw from p, and needs no normalised sums.
            noise = torch.empty_like(p).exponential_(generator=self.generator)
            token = int((p / noise).argmax())
        if s.repetition_penalty != 1 and not (self.seen == token).any():
            self.seen = torch.cat((self.seen, torch.tensor([token])))
        return token
