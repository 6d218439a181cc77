"""RTN: every weight goes to the nearest point of its group's grid. The baseline; reads no text and keeps no outliers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..qtensor import QTensor
from . import rounding
from .common import Block, Spec, quantize_matrix

MIXED_BITS = True


def complete(spec: Spec) -> Spec:
    """`spec` as this method takes it; ValueError if another rounding or a searched grid is asked for."""
    rounding.require_own(spec, "rtn")
    if spec.grid not in (None, "range"):
        raise ValueError(f"grid is {spec.grid!r}, but rtn reads no text that could say what an error costs")
    return replace(spec, outliers=0.0, score=None, scope=None, rounding="rtn", grid="range", samples=0, seq_len=0)


def quantize_block(block: Block, inputs: Callable[[], Tensor] | None, spec: Spec) -> dict[str, QTensor]:
    """The quantized linears of one block by name; `inputs` is not read."""
    w = block.weights
    return {n: quantize_matrix(w[f"{n}.weight"], spec.at(block.prefix + n), bias=w.get(f"{n}.bias"), name=block.prefix + n) for n in block.linears}


def round_matrix(w: Tensor, spec: Spec, mask: Tensor | None, statistics: None, bias: Tensor | None, name: str) -> QTensor:
    """`quantize_matrix`, for methods that choose masks."""
    return quantize_matrix(w, spec, mask, bias, name)
