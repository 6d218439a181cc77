"""GPTQ (arXiv 2210.17323): round a matrix column by column, and let the columns still to come make up for each one's error.

The layer's output error is sum_t s_t |(w - q) x_t|^2 = (w - q) H (w - q)^T for every row, H = sum_t s_t x_t x_t^T. With U the upper
Cholesky factor of H^-1, the best that columns c > j can do about the error of column j is

    w[:, c] -= (w[:, j] - q[:, j]) / U[j, j] * U[j, c]

and leaves ((w[:, j] - q[:, j]) / U[j, j])^2 of output error for good. Columns go from the largest input to the smallest, whose
errors matter least when nothing is left to make up for them. Grids are fitted before any column is touched, with 1 / U[j, j]^2 as
the price of an error; so a group's columns need not be neighbours in the order. `descent` goes on from there. With `grid="range"` it
is GPTQ as published: grids that span their weights, one pass.

x_t are the inputs that the quantized model computes, anew at every site. s_t is 1, but `SINK_WEIGHT` for the first token of a
window: attention falls back on it from everywhere, so that its error reaches every other token, while it is one of hundreds in the
sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..qtensor import QTensor, fit_group
from . import rounding
from .columns import round_columns
from .common import Block, Spec, assemble, fit_grid, require_finite
from .descent import improve
from .grid import search_grid

MIXED_BITS = True
SINK_WEIGHT = 100.0
DAMPING = 0.01  # of the mean diagonal of H is added to its diagonal
SAMPLES, SEQ_LEN = 32, 512


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults; ValueError if another rounding is asked for."""
    return rounding.alone(spec, "gptq", SAMPLES, SEQ_LEN)


quantize_block = rounding.round_block  # of a block that nothing was done to before


@dataclass
class Factor:
    """What a site's inputs say about rounding the columns of its weights."""

    h: Tensor  # f32[k, k]: the damped H
    order: Tensor  # i64[k]: columns from the first to the last to be rounded
    upper: Tensor  # f32[k, k]: Cholesky factor of the inverse of h, upper triangle, in that order

    @property
    def price(self) -> Tensor:
        """f32[k]: the output error that a unit of squared error in a column leaves for good."""
        price = torch.empty_like(self.upper.diagonal())
        price[self.order] = self.upper.diagonal().square().reciprocal()
        return price


def collect(block: Block, weights: dict[str, Tensor], site: str, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, Factor]:
    """The factor of each linear of a site, one for all."""
    x = block.quantized_inputs()
    h = gram(rounding.site_inputs(block, weights, site, x), first_token(x))
    return dict.fromkeys(block.sites[site], factorise(h))


def first_token(x: Tensor) -> Tensor:
    """s_t of the tokens of x[windows, t, :], f32[windows, t]."""
    s = torch.ones(x.shape[:2])
    s[:, 0] = SINK_WEIGHT
    return s


def gram(parts: Iterable[Tensor], token_weight: Tensor) -> Tensor:
    """f64[k, k]: sum over tokens of s_t x_t x_t^T, s = token_weight f32[samples, t]; the parts f32[windows, t, k] are all samples in order."""
    total, at = 0.0, 0
    for x in parts:
        s = token_weight[at : at + len(x)].sqrt().unsqueeze(2)
        x, at = (x * s).flatten(0, 1), at + len(x)
        total = total + (x.T @ x).double()
    return total


def factorise(h: Tensor, order: Tensor | None = None) -> Factor:
    """The factor of f64 h[k, k]. Damping grows tenfold until a Cholesky decomposition exists; inputs that were always 0 round to nearest."""
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if order is None else order
    dead = h.diagonal() == 0
    damping = DAMPING * float(h.diagonal().mean()) or 1.0
    while True:
        damped = h + torch.diag(damping + dead.double())
        # H = R R^T with an upper R, which is Cholesky's factor from the last column to the first, gives H^-1 = U^T U with U = R^-1.
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order].flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(h), dtype=h.dtype), upper=True)
            return Factor(damped.float(), order, upper.float())
        damping *= 10


def grid(w: Tensor, spec: Spec, mask: Tensor | None, price: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of each group of w[n, k] as `spec.grid` asks; price f32[k] is what an input's squared errors cost."""
    group = fit_group(spec.group_size, w.shape[1])
    if spec.grid == "search":
        return search_grid(w, spec, group, mask, price)
    return fit_grid(w, spec.bits, group, spec.symmetric, mask)


def round_matrix(
    w: Tensor, spec: Spec, mask: Tensor | None, statistics: Factor, bias: Tensor | None, name: str, draft: bool = False
) -> QTensor:
    """Round f32 w[n, k] with its site's factor; where mask[n, k] is true, what w became by the corrections is stored in float16.

    A draft is done when every column has had its turn.
    """
    require_finite(w, name)
    scale, zero = grid(w, spec, mask, statistics.price)
    codes, values = compensate(w, scale, zero, spec, mask, statistics)
    if spec.grid == "search" and not draft:
        scale, codes, values = improve(w, scale, zero, codes, values, spec, mask, statistics.h)
    return assemble(values, codes, scale, zero, spec, mask, bias, name)


draft_matrix = partial(round_matrix, draft=True)


def compensate(w: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec, mask: Tensor | None, factor: Factor) -> tuple[Tensor, Tensor]:
    """(codes u8[n, k], f32[n, k]: the weights as they were when their turn to be rounded came)."""
    return round_columns(w, scale, zero, spec, mask, (factor.upper / factor.upper.diagonal().unsqueeze(1)).T, order=factor.order)
