"""GPFQ (arXiv 2201.11113): greedy path following, a code at a time so that the sum of what was rounded stays on the float one's path.

With X the inputs that the float model gives a layer and X' those of the quantized model, one column of tokens an input, a row w is
walked from its first input to its last:

    u_t = u_(t-1) + w_t X_t - q_t X'_t,    q_t = nearest code to <X'_t, u_(t-1) + w_t X_t> / |X'_t|^2

It is the only rounding here that makes up for what the blocks before it have done to the inputs. Multiplied out, only two sums over
tokens remain, G = X'^T X' and C = X'^T X, and nothing is inverted, so that any number of tokens will do:

    q_t = nearest code to (sum_(j<=t) w_j C[t, j] - sum_(j<t) q_j G[t, j]) / G[t, t]

Against the paper: b bits hold 2^b codes, not 2^b + 1; grids are fitted to a group, not to the layer; tokens are weighed as in `gptq`; an
input that is never there keeps its weights, rounded to nearest, because it may be there in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..qtensor import QTensor
from . import gptq, rounding
from .columns import round_columns
from .common import Block, Spec, assemble, require_finite

MIXED_BITS = True
SAMPLES, SEQ_LEN = gptq.SAMPLES, gptq.SEQ_LEN


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults; ValueError if another rounding is asked for."""
    return rounding.alone(spec, "gpfq", SAMPLES, SEQ_LEN)


quantize_block = rounding.round_block  # of a block that nothing was done to before


@dataclass
class Paths:
    """What the two streams say about a site."""

    gram: Tensor  # f32[k, k]: X'^T X'
    cross: Tensor  # f32[k, k]: X'^T X


def collect(block: Block, weights: dict[str, Tensor], site: str, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, Paths]:
    """The sums of a site, the same for its linears."""
    gram = cross = 0.0
    streams = rounding.site_inputs(block, weights, site, block.quantized_inputs()), rounding.site_inputs(block, block.weights, site, inputs())
    for ours, theirs in zip(*streams, strict=True):
        s = gptq.first_token(ours).sqrt().unsqueeze(2)
        ours, theirs = (ours * s).flatten(0, 1), (theirs * s).flatten(0, 1)
        gram, cross = gram + (ours.T @ ours).double(), cross + (ours.T @ theirs).double()
    return dict.fromkeys(block.sites[site], Paths(gram.float(), cross.float()))


def round_matrix(w: Tensor, spec: Spec, mask: Tensor | None, statistics: Paths, bias: Tensor | None, name: str) -> QTensor:
    """Round f32 w[n, k] along its site's paths; where mask[n, k] is true, what would be rounded is stored in float16."""
    require_finite(w, name)
    gram = statistics.gram
    scale, zero = gptq.grid(w, spec, mask, gram.diagonal())
    dead = gram.diagonal() == 0
    # What is left of <X'_t, u_(t-1) + w_t X_t> / |X'_t|^2: all of w's part, and less of q's with every column that is done.
    norm = torch.where(dead, 1.0, gram.diagonal())
    rest = torch.where(dead, w, w @ torch.tril(statistics.cross).T) / norm
    codes, values = round_columns(rest, scale, zero, spec, mask, -gram / norm.unsqueeze(1), base=torch.zeros_like(w))
    return assemble(values, codes, scale, zero, spec, mask, bias, name)
