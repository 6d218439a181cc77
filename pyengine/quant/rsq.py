"""RSQ (arXiv 2503.01820): GPTQ in which a token counts by the attention it receives.

The mass of token j is the attention that all heads and later tokens of its window pay to it, measured in the block before any of its
linears is quantized. Within a window it is mapped to [r, 1], from the least to the most, and then to mean 1; it weighs the token in the
Grams of all linears of the block. Two things are added to the paper. The first token of a window, the attention sink, would set the
map alone, up to half of all mass being its own; it is left out of the map and weighs `SINK_WEIGHT` as in `gptq`. And r grows from
`LEAST` until the effective number of tokens, (sum w)^2 / sum w^2, is half of all: with fewer, the Grams are noise.

The paper's rotation is another method's part: `--method quarot --rounding rsq`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import gptq, rounding
from .common import Block, Spec
from .gptq import SINK_WEIGHT, Factor, draft_matrix, round_matrix

__all__ = ["MIXED_BITS", "collect", "complete", "draft_matrix", "quantize_block", "round_matrix"]
MIXED_BITS = True
LEAST = 0.1


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults; ValueError if another rounding is asked for."""
    return rounding.alone(spec, "rsq", samples=gptq.SAMPLES, seq_len=gptq.SEQ_LEN)


quantize_block = rounding.round_block  # of a block that nothing was done to before


def collect(block: Block, weights: dict[str, Tensor], site: str, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, Factor]:
    """The factor of each linear of a site, one for all."""
    x = block.quantized_inputs()
    if site == next(iter(block.sites)):  # nothing of this block is quantized yet
        block.notes["token_weight"] = token_weights(attention_mass(block, weights, x))
    h = gptq.gram(rounding.site_inputs(block, weights, site, x), block.notes["token_weight"])
    return dict.fromkeys(block.sites[site], gptq.factorise(h))


def attention_mass(block: Block, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """f32[windows, t]: the attention that each token of x[windows, t, hidden] receives, summed over heads and queries."""
    return torch.stack([p.sum((0, 1)) for p in rounding.attention(block, weights, x)])


def token_weights(mass: Tensor) -> Tensor:
    """f32[windows, t] from the attention mass f32[windows, t]; the mean over all but the first token of a window is 1."""
    rest = mass[:, 1:]
    low, high = rest.amin(1, keepdim=True), rest.amax(1, keepdim=True)
    share, least = (rest - low) / (high - low).clamp(min=1e-30), LEAST
    while True:
        w = share * (1 - least) + least
        w = w / w.mean(1, keepdim=True)
        if float(w.sum() ** 2 / w.square().sum()) >= 0.5 * w.numel():
            return torch.cat((torch.full_like(mass[:, :1], SINK_WEIGHT), w), 1)
        least = min(1.0, 1.5 * least)
