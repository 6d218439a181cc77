"""Rounding a matrix a column at a time onto its grid, as GPTQ, GPFQ and coordinate descent do: each column's error moves those still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .common import Spec


def round_columns(
    w: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec, mask: Tensor | None, coupling: Tensor,
    base: Tensor | None = None, order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(codes u8[n, k] as `assemble` takes them, f32[n, k]: the columns of w f32[n, k] as they were when their turn came).

    When a column has become q, those behind it in `order` i64[k] have coupling[c, j] · (q − base) added, where base f32[n, k] is the column itself
    if it is not given; coupling f32[k, k] counts columns in that order, with later ones below earlier ones. Under mask bool[n, k] q is the
    column in float16.
    """
    n, k = w.shape
    order = torch.arange(k) if order is None else order
    low, high = (0, 2**spec.bits - 1) if zero is not None else (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1)
    codes, values = ops.round_columns(
        w[:, order], scale.float(), None if zero is None else zero.float(), (order // (k // scale.shape[1])).int(), coupling.contiguous(),
        (low, high), 0 if zero is not None else 2 ** (spec.container - 1),
        None if mask is None else mask[:, order], None if base is None else base[:, order],
    )  # fmt: skip
    back = torch.argsort(order)
    return codes[:, back].contiguous(), values[:, back].contiguous()
