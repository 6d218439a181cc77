"""GPTQ (arXiv 2210.17323): round a matrix column by column, and let the columns still to come make up for each one's error.

The layer's output error is sum_t s_t |(w - q) x_t|^2 = (w - q) H (w - q)^T for every row, H = sum_t s_t x_t x_t^T. With U the upper
Cholesky factor of H^-1, the best that columns c > j can do about the error of column j is

    w[:, c] -= (w[:, j] - q[:, j]) / U[j, j] * U[j, c]

x_t are the inputs that the quantized model computes, before every site anew. s_t is 1, but `SINK_WEIGHT` for the first token of a
window: attention falls back on it from everywhere, so that its error reaches every other token, while it is one of hundreds in the
sum. Grids are fitted before any column is touched, which leaves the order free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..qtensor import QTensor, fit_group
from . import rounding
from .common import Block, Spec, assemble, fit_grid, require_finite

SINK_WEIGHT = 100.0
DAMPING = 0.01  # of the mean diagonal of H is added to its diagonal
COLUMNS = 128  # columns whose corrections are gathered before they go to the rest of the matrix as one product


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults; ValueError if another rounding is asked for."""
    if spec.rounding not in (None, "gptq"):
        raise ValueError(f"rounding is {spec.rounding!r}, but gptq is a rounding itself; use method {spec.rounding}")
    return replace(spec, outliers=0.0, score=None, scope=None, rounding="gptq", samples=spec.samples or 16, seq_len=spec.seq_len or 1024)


def quantize_block(block: Block, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, QTensor]:
    """The quantized linears of one block by name, from the inputs that the quantized blocks before it make."""
    return rounding.round_block(block, inputs, spec)


@dataclass
class Factor:
    """What a site's inputs say about rounding the columns of its weights."""

    order: Tensor  # i64[k]: columns from the first to the last to be rounded
    upper: Tensor  # f32[k, k]: Cholesky factor of the inverse of the damped H, upper triangle, in that order


def collect(block: Block, weights: dict[str, Tensor], site: str, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, Factor]:
    """The factor of each linear of a site, one for all."""
    h = gram(rounding.site_inputs(block, weights, site, block.quantized_inputs()), first_token)
    return dict.fromkeys(block.sites[site], factorise(h))


def first_token(x: Tensor) -> Tensor:
    """s_t of x[windows, t, k], f32[windows, t]."""
    s = torch.ones(x.shape[:2])
    s[:, 0] = SINK_WEIGHT
    return s


def gram(parts, token_weight: Callable[[Tensor], Tensor]) -> Tensor:
    """f64[k, k]: sum over tokens of s_t x_t x_t^T, where parts are f32[windows, t, k] and token_weight gives s of each."""
    total = 0.0
    for x in parts:
        x = (x * token_weight(x).sqrt().unsqueeze(2)).flatten(0, 1)
        total = total + (x.T @ x).double()
    return total


def factorise(h: Tensor, order: Tensor | None = None) -> Factor:
    """The factor of f64 h[k, k]. Damping grows tenfold until a Cholesky decomposition exists; inputs that were always 0 round to nearest."""
    k = h.shape[0]
    order = torch.arange(k) if order is None else order
    h = h[order][:, order]
    diagonal = h.diagonal()
    dead = diagonal == 0
    damping = DAMPING * float(diagonal.mean()) or 1.0
    while True:
        damped = h + torch.diag(damping + dead.double())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return Factor(order, upper.float())
        damping *= 10


def round_matrix(w: Tensor, spec: Spec, mask: Tensor | None, statistics: Factor, bias: Tensor | None, name: str) -> QTensor:
    """Round f32 w[n, k] with its site's factor; where mask[n, k] is true, what w became by the corrections is stored in float16."""
    require_finite(w, name)
    scale, zero = fit_grid(w, spec.bits, fit_group(spec.group_size, w.shape[1]), spec.symmetric, mask)
    codes, values = compensate(w, scale, zero, spec, mask, statistics)
    return assemble(values, codes, scale, zero, spec, mask, bias, name)


def compensate(w: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec, mask: Tensor | None, factor: Factor) -> tuple[Tensor, Tensor]:
    """(codes u8[n, k], f32[n, k]: the weights as they were when their turn to be rounded came)."""
    (n, k), order, upper = w.shape, factor.order, factor.upper
    low, high = (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) if zero is None else (0, 2**spec.bits - 1)
    # Transposed, a column is contiguous.
    scales, rest = scale.float().T.contiguous(), w.T[order].contiguous()
    zeros = torch.zeros_like(scales) if zero is None else zero.float().T.contiguous()
    kept = None if mask is None else mask.T[order].contiguous()
    groups, pivots = (order // (k // scale.shape[1])).tolist(), upper.diagonal().tolist()
    codes = torch.empty(k, n)
    for a in range(0, k, COLUMNS):
        b = min(a + COLUMNS, k)
        errors = torch.empty(b - a, n)
        for j in range(a, b):
            column, s, z = rest[j], scales[groups[j]], zeros[groups[j]]
            code = torch.round(column / s).add_(z).clamp_(low, high)
            codes[j] = code
            q = (code - z).mul_(s)
            if kept is not None:
                q = torch.where(kept[j], column.half().float(), q)
            errors[j - a] = (column - q).div_(pivots[j])
            rest[j + 1 : b].addr_(upper[j, j + 1 : b], errors[j - a], alpha=-1)
        rest[b:].addmm_(upper[a:b, b:].T, errors, alpha=-1)
    back = torch.argsort(order)
    if zero is None:
        codes += 2 ** (spec.container - 1)
    return codes[back].T.to(torch.uint8).contiguous(), rest[back].T.contiguous()
