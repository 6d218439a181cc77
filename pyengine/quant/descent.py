"""What is left to win when every column has been rounded once: least squares for the scales, coordinate descent for the codes.

Both lower the output error (w - q) H (w - q)^T, each with the other held. For fixed codes it is a quadratic form in the scales of a
row, one a group. For fixed scales, one column at a time, the best place for q[:, j] is q[:, j] + ((w - q) H)[:, j] / H[j, j], and the
nearest code to it is the best one; a first pass could only look ahead, this one knows what all other columns have become. Values under
a mask are not rounded to codes but move with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Spec, assemble
from .columns import round_columns

ROUNDS = 2


def improve(
    w: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor, values: Tensor, spec: Spec, mask: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, codes, values) with less output error for f32 w[n, k], where they are as `assemble` takes them and h is f32[k, k]."""
    for _ in range(ROUNDS):
        scale = refit(w, scale, zero, codes, values, spec, mask, h)
        codes, values = descend(w, scale, zero, codes, values, spec, mask, h)
    return refit(w, scale, zero, codes, values, spec, mask, h), codes, values


def refit(w: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor, values: Tensor, spec: Spec, mask: Tensor | None, h: Tensor) -> Tensor:
    """The scales [n, groups] that are best for these codes; as they were for groups that have nothing to scale."""
    ones = torch.ones_like(scale)
    steps = assemble(torch.zeros_like(w), codes, ones, zero, spec, mask, None, "steps").dequantize()
    error = w - assemble(values, codes, scale, zero, spec, mask, None, "codes").dequantize()
    groups = scale.shape[1]
    size = w.shape[1] // groups
    a = torch.zeros(len(w), groups, groups)
    for i in range(groups):
        at = i * size  # of the rows of a symmetric matrix only what is right of the diagonal is summed
        pairs = (steps[:, at : at + size] @ h[at : at + size, at:]).mul_(steps[:, at:]).unflatten(1, (-1, size)).sum(2)
        a[:, i, i:] = a[:, i:, i] = pairs
    b = ((error @ h) * steps).unflatten(1, (groups, size)).sum(2)
    diagonal = a.diagonal(dim1=1, dim2=2).double()
    # A little damping, towards the scales there are: with fewer tokens than groups they are not all determined.
    damped = a.double() + torch.diag_embed(1e-6 * diagonal.mean(1, keepdim=True) + (diagonal == 0).double())
    found = (scale.double() + torch.linalg.solve(damped, b.double().unsqueeze(2)).squeeze(2)).to(scale.dtype)
    return torch.where(torch.isfinite(found) & (found != 0), found, scale)


def descend(
    w: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor, values: Tensor, spec: Spec, mask: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    """(codes, values) after every column has once moved to where the others want it."""
    q = assemble(values, codes, scale, zero, spec, mask, None, "codes").dequantize()
    reach = torch.where(h.diagonal() > 0, h.diagonal().reciprocal(), 0.0)
    wanted = q + (w - q) @ h * reach
    return round_columns(wanted, scale, zero, spec, mask, -h * reach.unsqueeze(1), base=q)
