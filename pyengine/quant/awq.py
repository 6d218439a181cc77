"""AWQ (arXiv 2306.00978): inputs that carry large activations get finer steps, by scaling their columns up before rounding.

s = mean|x|^alpha of each input, for the alpha of a grid from 0 (plain rounding) to 0.95 that leaves the least error in the outputs of the
site's linears: the sum over them of tr((Q(W s)/s - W) H (Q(W s)/s - W)^T) with H = sum_t x_t x_t^T, which needs no pass over the data for
each alpha. quant/merge.py says where 1/s goes. Clipping of weights, which the authors' code searches afterwards, is left out.

With outliers asked for, the weights that stay float16 are then chosen among the scaled ones by the output error that rounding them alone
costs (score hdiag_dw2 of quant/gwq.py): no backward pass is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..qtensor import QTensor
from . import rounding
from .common import Block, Spec, rounding_error
from .merge import changed_norms, scale_inputs, shared, visit_inputs
from .outliers import choose, mask_of

MIXED_BITS = True
OUTLIERS = 0.0
STEPS_OF_ALPHA = 20


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults; ValueError for outliers that it cannot choose."""
    if spec.score not in (None, "hdiag_dw2") or spec.scope == "global":
        raise ValueError(f"score is {spec.score!r} and scope {spec.scope!r}, but awq ranks outliers by hdiag_dw2, not across matrices")
    kept = {"score": "hdiag_dw2", "scope": spec.scope or "tensor"} if spec.outliers else {"score": None, "scope": None}
    return rounding.complete(replace(spec, **kept), "rtn", 16, 256)


@dataclass
class SiteInputs:
    """What the search needs of a site's inputs."""

    magnitude: Tensor  # f32[k]: mean |x|
    squares: Tensor  # f32[k]: sum of x² over tokens
    gram: Tensor  # f32[k, k]: sum of x xᵀ over tokens


def site_inputs(block: Block, inputs: Tensor) -> dict[str, SiteInputs]:
    """The statistics of every site over inputs f32[s, t, hidden].

    Magnitudes and squares leave the first token out: as the attention sink its activations are orders of magnitude above any other's.
    """
    sums: dict[str, SiteInputs] = {}
    tokens = inputs.shape[0] * (inputs.shape[1] - 1)

    def see(site: str, x: Tensor) -> None:
        k = x.shape[-1]
        total = sums.setdefault(site, SiteInputs(torch.zeros(k), torch.zeros(k), torch.zeros(k, k)))
        total.magnitude += x[:, 1:].abs().sum((0, 1)) / tokens
        total.squares += x[:, 1:].square().sum((0, 1))
        total.gram += x[0].T @ x[0]

    visit_inputs(block, inputs, see)
    return sums


def search(weights: list[Tensor], specs: list[Spec], seen: SiteInputs, magnitude: Tensor) -> tuple[float, Tensor]:
    """(alpha, s f32[k]) with the least output error of the linears f32[n, k] of a site, each rounded as its spec says."""
    best = (float("inf"), 0.0, torch.ones_like(magnitude))
    for step in range(STEPS_OF_ALPHA):
        alpha = step / STEPS_OF_ALPHA
        s = magnitude.clamp(min=1e-4) ** alpha
        s = s / (s.max() * s.min()).sqrt()
        error = output_error(weights, specs, s, seen.gram)
        if error < best[0]:
            best = error, alpha, s
    return best[1:]


def output_error(weights: list[Tensor], specs: list[Spec], s: Tensor, gram: Tensor) -> float:
    """What rounding w·s costs in the outputs of linears w f32[n, k] with inputs x / s: the sum of squares over tokens and outputs."""
    lost = (rounding_error(w * s, spec) / s for w, spec in zip(weights, specs, strict=True))
    return sum(float(((e @ gram) * e).sum(dtype=torch.float64)) for e in lost)


def quantize_block(block: Block, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, QTensor | Tensor]:
    """The quantized linears of one block by name, and its norms that took the scales. `inputs()` are its float inputs f32[s, t, hidden]."""
    weights, scores = dict(block.weights), {}
    for site, seen in site_inputs(block, inputs()).items():
        names = block.sites[site]
        magnitude = shared(site, seen.magnitude, block.config)
        alpha, s = search([block.weights[f"{name}.weight"] for name in names], [spec.at(block.prefix + name) for name in names], seen, magnitude)
        if alpha:
            scale_inputs(weights, site, names, s, block.config)
        for name in names if spec.outliers else ():
            lost = rounding_error(block.weights[f"{name}.weight"] * s, spec.at(block.prefix + name)) / s
            scores[name] = seen.squares * lost.square()
    masks = {name: mask_of(kept, scores[name].shape, spec) for name, kept in choose(scores, block.sites, spec).items()} if scores else {}
    return changed_norms(block, weights) | rounding.round_block(replace(block, weights=weights), inputs, spec, masks)
