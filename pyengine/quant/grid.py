"""Grids fitted by search: for each group the scale and zero that cost least, where an entry's squared error has a price.

The range of a group is shrunk in steps, so that its largest entries are clipped and all others rounded finer. A symmetric grid has one
code more below zero than above; a negative scale turns that around, so that the larger side of a group always gets it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import FLOAT16_MAX, TINY_SCALE, Spec, fit_grid

# Ranges that are tried, as shares of the whole. 2 and 3 bits clip more.
SHRINK = {
    8: (1.0,),
    4: (1.0, 0.95, 0.9, 0.86, 0.82, 0.76, 0.7, 0.62),
    3: (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52),
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
}


def search_grid(w: Tensor, spec: Spec, group: int, mask: Tensor | None, price: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of each group of w[n, k] as `fit_grid` returns them; price f32[k] is what the squared error of an input's weights costs.

    Entries under mask[n, k] cost nothing.
    """
    whole, zero = fit_grid(w, spec.bits, group, spec.symmetric, mask)
    if whole.dtype != torch.float16:
        return whole, zero
    prices = price.view(1, -1, group)
    if mask is not None:
        prices = prices * ~mask.view(w.shape[0], -1, group)
        w = w.masked_fill(mask, 0.0)
    w = w.unflatten(1, (-1, group))
    best = Best(w, prices, spec, group)
    if spec.symmetric:
        top, full = w.abs().amax(2), 2 ** (spec.bits - 1)
        for share in SHRINK[spec.bits]:
            for steps in (full, -full):
                best.offer(top * (share / steps))
        best.offer(whole.float())
        return best.scale.half(), None
    low, high = w.amin(2).clamp(max=0.0), w.amax(2).clamp(min=0.0)
    shares = [torch.tensor(s).expand_as(low) for s in SHRINK[spec.bits]]
    for s in shares:
        best.offer_range(low, high, s, s)
    for s in shares[1:]:
        best.offer_range(low, high, s, best.shares[1])
    for s in shares[1:]:
        best.offer_range(low, high, best.shares[0], s)
    return best.scale.half(), best.zero.to(torch.uint8)


class Best:
    """The cheapest grid of each group of w[n, groups, group] so far."""

    def __init__(self, w: Tensor, prices: Tensor, spec: Spec, group: int):
        self.w, self.prices = w, prices
        self.least = 0 if not spec.symmetric else -(2 ** (spec.bits - 1))
        self.most = self.least + 2**spec.bits - 1
        self.cost = torch.full(w.shape[:2], torch.inf)
        self.scale, self.zero = torch.ones(w.shape[:2]), torch.zeros(w.shape[:2])
        self.shares = (torch.ones(w.shape[:2]), torch.ones(w.shape[:2]))

    def offer(self, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Take scale f32[n, groups] (and zero) where it is cheaper; bool[n, groups]: where it was. Scales are rounded to what is stored."""
        scale = torch.where(scale.abs() < TINY_SCALE, TINY_SCALE, scale).half().float()
        zero = torch.zeros_like(scale) if zero is None else zero
        s, z = scale.unsqueeze(2), zero.unsqueeze(2)
        error = (self.w / s).round_().add_(z).clamp_(self.least, self.most).sub_(z).mul_(s).sub_(self.w)
        cost = error.square_().mul_(self.prices).sum(2)
        better = cost < self.cost
        self.cost, self.scale, self.zero = (torch.where(better, a, b) for a, b in ((cost, self.cost), (scale, self.scale), (zero, self.zero)))
        return better

    def offer_range(self, low: Tensor, high: Tensor, low_share: Tensor, high_share: Tensor) -> None:
        """An asymmetric grid over [low * low_share, high * high_share]."""
        low, high = low * low_share, high * high_share
        scale = ((high - low) / self.most).clamp(TINY_SCALE, FLOAT16_MAX).half().float()
        better = self.offer(scale, (-low / scale).round_().clamp_(0, self.most))
        self.shares = tuple(torch.where(better, a, b) for a, b in zip((low_share, high_share), self.shares, strict=True))
