"""Rounding a matrix a column at a time onto its grid, as GPTQ, GPFQ and coordinate descent do."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Spec

COLUMNS = 128  # columns whose effect on the others is gathered before it goes to the rest of the matrix as one product


class Columns:
    """Rounds a matrix of n rows a column at a time; columns are counted in `order` i64[k]. Transposed, they are contiguous."""

    def __init__(self, scale: Tensor, zero: Tensor | None, spec: Spec, mask: Tensor | None, order: Tensor):
        self.scale = scale.float().T.contiguous()
        self.zero = torch.zeros_like(self.scale) if zero is None else zero.float().T.contiguous()
        self.low, self.high = (0, 2**spec.bits - 1) if zero is not None else (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1)
        self.excess = 0 if zero is not None else 2 ** (spec.container - 1)  # of what is stored over the code
        self.mask, self.order = None if mask is None else mask.T[order].contiguous(), order
        self.groups = (order // (order.numel() // self.scale.shape[0])).tolist()
        self.code = torch.empty(order.numel(), scale.shape[0])

    def round(self, j: int, column: Tensor) -> Tensor:
        """What is stored for the j-th column f32[n], as f32[n]; keeps its codes."""
        s, z = self.scale[self.groups[j]], self.zero[self.groups[j]]
        code = torch.round(column / s).add_(z).clamp_(self.low, self.high)
        self.code[j] = code
        q = code.sub_(z).mul_(s)
        return q if self.mask is None else torch.where(self.mask[j], column.half().float(), q)

    def codes(self) -> Tensor:
        """u8[n, k], when all columns are rounded."""
        return (self.code[torch.argsort(self.order)].T + self.excess).to(torch.uint8).contiguous()
