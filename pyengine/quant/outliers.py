"""Which weights stay in float16: from scores (how much is lost by rounding each weight) to the places of a scope.

    tensor      floor(share * numel) of each matrix
    global      floor(share * weights) of all matrices together; only scores that estimate the loss compare across matrices
    row         the same number in every row: round(share * k), but at least one
    structured  as many as `row`, one in each of equal runs of a row (1 in 96 of 576 inputs at 1 %)
    columns     whole inputs, round(share * k) but at least one, by the sum of their scores over the linears that share the input

Equal scores go to the lower place, for torch.topk promises no order among equals and then two runs could write different files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Spec, top_mask


def choose(scores: dict[str, Tensor], sites: dict[str, tuple[str, ...]], spec: Spec) -> dict[str, Tensor]:
    """What stays float16 of each linear, i64[p] ascending: flat indices of f32[n, k], or columns for that scope.

    `scores` f32[n, k] has all linears of a block by name, `sites` says which share an input. Not for the scope `global`.
    """
    if spec.scope == "columns":
        return {name: top_columns([scores[other] for other in names], spec.outliers) for names in sites.values() for name in names}
    mask = {"tensor": top_mask, "row": row_mask, "structured": structured_mask}[spec.scope]
    return {name: mask(score, spec.outliers).flatten().nonzero().flatten() for name, score in scores.items()}


def mask_of(kept: Tensor, shape: torch.Size, spec: Spec) -> Tensor:
    """bool[n, k] of what `choose` returned for a matrix of that shape."""
    mask = torch.zeros(shape, dtype=torch.bool)
    if spec.scope == "columns":
        mask[:, kept] = True
    else:
        mask.view(-1)[kept] = True
    return mask


def count_of(share: float, k: int) -> int:
    """How many of k inputs a share of them is."""
    return max(1, round(share * k)) if share else 0


def row_mask(score: Tensor, share: float) -> Tensor:
    """bool[n, k]: the largest entries of each row of score[n, k]."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros(score.shape, dtype=torch.bool).scatter_(1, order[:, : count_of(share, score.shape[1])], True)


def structured_mask(score: Tensor, share: float) -> Tensor:
    """bool[n, k]: the largest entry in each of equal runs of each row of score[n, k]."""
    k = score.shape[1]
    count = count_of(share, k)
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for i in range(count):
        begin, end = i * k // count, (i + 1) * k // count
        mask.scatter_(1, begin + score[:, begin:end].argmax(1, keepdim=True), True)
    return mask


def top_columns(scores: list[Tensor], share: float) -> Tensor:
    """i64[c] ascending: the inputs with the largest sum over all rows of all scores f32[n, k]."""
    total = sum(score.double().sum(0) for score in scores)
    return total.sort(descending=True, stable=True).indices[: count_of(share, len(total))].sort().values


class Best:
    """The `count` largest scores among matrices that come one after another, without holding all of their scores.

    A matrix leaves its candidates, the entries that may still be among the best when it comes; `trim` picks from them at the end.
    """

    def __init__(self, count: int):
        self.count, self.scores = count, torch.empty(0)

    def add(self, score: Tensor) -> Tensor:
        """f64[2, p]: flat places and scores of the candidates of score f32[n, k]."""
        flat = score.flatten()
        places = (flat >= self.least).nonzero().flatten()
        candidates = torch.stack((places.double(), flat[places].double()))
        self.see(candidates)
        return candidates

    def see(self, candidates: Tensor) -> None:
        """Counts candidates that an earlier run has left."""
        scores = torch.cat((self.scores, candidates[1].float()))
        self.scores = scores.topk(min(self.count, len(scores)), sorted=False).values

    @property
    def least(self) -> float:
        """Scores below this are not among the best."""
        if not self.count:
            return float("inf")
        return float(self.scores.min()) if len(self.scores) == self.count else 0.0

    def trim(self, candidates: list[Tensor]) -> list[Tensor]:
        """i64[p] for each matrix: the places that are among the best of all. Equal scores go to the earlier matrix of the list."""
        least = self.least
        ties = self.count - int((self.scores > least).sum())
        out = []
        for places, scores in candidates:
            equal = (scores == least).nonzero().flatten()[:ties]
            ties -= len(equal)
            chosen = (scores > least).index_fill(0, equal, True)
            out.append(places[chosen].long())
        return out
