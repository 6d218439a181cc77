"""LRQ (arXiv 2407.11534): FlexRound with divisors of low rank, which learn less by heart where calibration texts are few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..qtensor import QTensor
from . import flexround, rounding
from .common import Block, Spec
from .flexround import MIXED_BITS, STEPS, statistics

__all__ = ["MIXED_BITS", "STEPS", "complete", "quantize_block", "round_block", "statistics"]

RANK = 32


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults; ValueError if another rounding is asked for."""
    rounding.require_own(spec, "lrq")
    return replace(flexround.complete(replace(spec, rounding=None)), rounding="lrq")


def quantize_block(block: Block, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, QTensor]:
    """The quantized linears of one block by name. `inputs()` are its float inputs f32[s, t, hidden]."""
    return round_block(block, inputs, spec, {})


def round_block(block: Block, inputs: Callable[[], Tensor], spec: Spec, masks: dict[str, Tensor]) -> dict[str, QTensor]:
    """As `quantize_block`, with masks bool[n, k] by name of what stays float16."""
    return flexround.round_block(block, inputs, spec, masks, RANK)
