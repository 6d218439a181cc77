"""REx (arXiv 2203.14645): what rounding has lost is rounded again, and again: a weight is the sum of matrices of few bits.

    w_1 = Q(w),  w_k = Q(w - w_1 - ... - w_{k-1})

A step of order k is max|residual| / (2^(b-1) - 1) of its group, and it leaves at most half a step, so that each order divides the bound
on the error by 2^b - 2 (14 for 4 bits). Orders from the second on may be kept for the share `rows` of the outputs alone, those that have
lost most. Reads no text; the kernels add one product for every order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..qtensor import QTensor
from .common import Block, Spec, quantize_matrix

MIXED_BITS = True


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults: two orders, the second for half of the outputs. ValueError if another rounding is asked for."""
    if spec.rounding not in (None, "rtn"):
        raise ValueError(f"rounding is {spec.rounding!r}, but what rex leaves for the next order is what rounding to nearest has lost")
    if spec.grid not in (None, "range"):
        raise ValueError(f"grid is {spec.grid!r}, but the bound of rex holds for grids that span all weights of a group")
    orders, rows = spec.orders or 2, 0.5 if spec.rows is None else spec.rows
    return replace(spec, outliers=0.0, score=None, scope=None, rounding="rtn", grid="range", orders=orders, rows=rows, samples=0, seq_len=0)


def expand(w: Tensor, spec: Spec, bias: Tensor | None = None, name: str = "weight") -> QTensor:
    """f32 w[n, k] as the sum of spec.orders matrices."""
    q = quantize_matrix(w, spec, bias=bias, name=name)
    count = round(spec.rows * len(w))
    if spec.orders > 1 and count:
        lost = w - q.dequantize()
        rows = lost.square().sum(1).sort(descending=True, stable=True).indices[:count].sort().values
        q.residual = expand(lost[rows], replace(spec, orders=spec.orders - 1, rows=1.0), name=f"{name}.residual")
        q.residual.rows = rows.int() if count < len(w) else None
    return q


def quantize_block(block: Block, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, QTensor]:
    """The quantized linears of one block by name; `inputs` is not read."""
    w = block.weights
    return {n: expand(w[f"{n}.weight"], spec.at(block.prefix + n), w.get(f"{n}.bias"), block.prefix + n) for n in block.linears}
