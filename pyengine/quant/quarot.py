"""Rotations without training, after QuaRot (arXiv 2404.00456): Hadamard matrices spread what stands out in activations and weights.

Sites, tensors and merging are those of FlatQuant; each basis is the Kronecker product of two normalised Hadamard matrices, or of random
rotations where none exists, and rows, tokens, keys and values are clipped at fixed ratios. QuaRot itself rotates the residual stream
once and for all, which saves the transforms before attention and MLP at run time; here every site is turned by itself, so that one
runtime serves both methods. It reads no text, unless the rounding does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..qtensor import QTensor
from . import rounding
from .common import Block, Spec
from .flatquant import RECIPE, FlatBlock, require_symmetric, stored

GROUP_SIZE = 0


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults."""
    require_symmetric(spec)
    return rounding.complete(replace(spec, outliers=0.0, score=None, scope=None, grid="range"))


def quantize_block(block: Block, inputs: Callable[[], Tensor] | None, spec: Spec) -> dict[str, QTensor | Tensor]:
    """The tensors of one block; `inputs` f32[s, t, hidden] are read by the rounding only."""
    random = torch.Generator().manual_seed(spec.seed + block.index)
    return stored(FlatBlock(block, spec, replace(RECIPE, scale=False), {}, random), inputs)
