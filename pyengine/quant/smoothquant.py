"""SmoothQuant (arXiv 2211.10438): move the outliers of activations into the weights, so that both round well. For act_bits 8 or 4.

s = max|x|^0.5 / max|w|^0.5 of each input, the maximum of w over all linears that read it. Only inputs that a norm makes are smoothed, as
in the paper; quant/merge.py says where 1/s goes. Weights have one scale a row, activations one a token: the baseline for integer products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..qtensor import QTensor
from . import rounding
from .common import Block, Spec
from .merge import NORMS, changed_norms, scale_inputs, visit_inputs

MIXED_BITS = True
GROUP_SIZE = 0
ALPHA = 0.5  # share of the difficulty that goes to the weights


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults; ValueError if the activations are not quantized, for then there is nothing to smooth."""
    if spec.act_bits == 16:
        raise ValueError("act_bits is 16, but smoothquant prepares a model for quantized activations: give 8 or 4")
    return rounding.complete(replace(spec, outliers=0.0, score=None, scope=None), "rtn", 16, 256)


def quantize_block(block: Block, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, QTensor | Tensor]:
    """The quantized linears of one block by name, and its norms. `inputs()` are its float inputs f32[s, t, hidden]."""
    top: dict[str, Tensor] = {}

    def see(site: str, x: Tensor) -> None:
        largest = x.abs().amax((0, 1))
        top[site] = torch.maximum(top[site], largest) if site in top else largest

    visit_inputs(block, inputs(), see)
    weights = dict(block.weights)
    for site in NORMS:
        names = block.sites[site]
        of_weights = torch.stack([block.weights[f"{name}.weight"].abs().amax(0) for name in names]).amax(0)
        s = top[site].clamp(min=1e-5) ** ALPHA / of_weights.clamp(min=1e-5) ** (1 - ALPHA)
        scale_inputs(weights, site, names, s, block.config)
    return changed_norms(block, weights) | rounding.round_block(replace(block, weights=weights), inputs, spec)
