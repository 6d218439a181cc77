"""SmoothQuant (arXiv 2211.10438): move the outliers of activations into the weights, so that both round well. For act_bits 8 or 4.

s = max|x|^0.5 / max|w|^0.5 of each input, the maximum of w over all linears that read it. Only inputs that a norm makes are smoothed, as
in the paper; quant/merge.py says where 1/s goes. Weights have one scale a row, activations one a token: the baseline for integer products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..qtensor import QTensor
from . import rounding
from .common import Block, Spec
from .merge import NORMS, changed_norms, observe, scale_inputs, smoothing

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
    weights, (_, largest) = dict(block.weights), observe(block, inputs())
    for site in NORMS:
        scale_inputs(weights, site, block.sites[site], 1 / smoothing(block, site, largest[site], ALPHA), block.config)
    return changed_norms(block, weights) | rounding.round_block(replace(block, weights=weights), inputs, spec)
