"""Quantize and dequantize in one go, in plain torch, with the gradients that learned transforms and clips need.

Rounding passes the gradient on as it is; what was clipped gets none; the rest flows through the scale to the clip ratios and to the
largest and smallest entry. The forward values are those of the kernels, so that evaluation uses the same functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 2.0**-100  # the scale of what is all zero: neither 0/0 nor a subnormal


def quantize_rows(w: Tensor, ratio: Tensor, bits: int) -> Tensor:
    """w[n, groups, g] on the symmetric grid of each group, whose ends are ratio[n, groups, 2] of (max, −min); what lies beyond is clipped."""
    return _Rows.apply(w, ratio, 2 ** (bits - 1) - 1)


def clip_rows(w: Tensor, ratio: Tensor) -> Tensor:
    """w[n, groups, g] clipped to ratio[n, groups, 2] of each group's (max, −min)."""
    high = ratio[..., 0:1] * w.amax(-1, keepdim=True).clamp(min=0)
    low = ratio[..., 1:2] * w.amin(-1, keepdim=True).clamp(max=0)
    return torch.minimum(torch.maximum(w, low), high)


def quantize_tokens(x: Tensor, ratio: Tensor, bits: int) -> Tensor:
    """x[..., k], each row with the scale max(ratio[0]·max, ratio[1]·(−min)) / (2^(bits−1) − 1) and codes down to −2^(bits−1)."""
    return _Tokens.apply(x, ratio, 2 ** (bits - 1) - 1)


def quantize_asymmetric(x: Tensor, ratio: Tensor, bits: int) -> Tensor:
    """x[..., k] with codes from 0 to 2^bits − 1 over each row's range, ratio[..., 0]·max down to ratio[..., 1]·min, which holds zero."""
    high, low = ratio[..., 0:1] * x.amax(-1, keepdim=True).clamp(min=0), ratio[..., 1:2] * x.amin(-1, keepdim=True).clamp(max=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=TINY)
    zero = _round(-low / scale)
    return scale * ((_round(x / scale) + zero).clamp(0, 2**bits - 1) - zero)


def quantize_cached(x: Tensor, ratio: Tensor, bits: int) -> Tensor:
    """Keys or values x[..., head_dim] as the KV cache holds them: 4 bits asymmetric, 8 bits symmetric, or as they are."""
    if bits == 4:
        return quantize_asymmetric(x, ratio, 4)
    return quantize_tokens(x, ratio, bits) if bits == 8 else x


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _ends(x: Tensor, ratio: Tensor) -> tuple[Tensor, ...]:
    """(largest entry or 0, its place, −smallest or 0, its place, clipped upper end, clipped lower end) of each row of x."""
    most, most_at = x.max(-1, keepdim=True)
    least, least_at = x.min(-1, keepdim=True)
    most, least = most.clamp(min=0), (-least).clamp(min=0)
    return most, most_at, least, least_at, ratio[..., 0:1] * most, ratio[..., 1:2] * least


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, ratio, levels):
        most, most_at, least, least_at, high, low = _ends(w, ratio)
        scale = (torch.maximum(high, low) / levels).clamp(min=TINY)
        clipped = torch.minimum(torch.maximum(w, -low), high)
        steps = (clipped / scale).round_()
        ctx.save_for_backward(ratio, most, most_at, least, least_at, high, low, w, clipped, steps - clipped / scale)
        ctx.levels = levels
        return steps * scale

    @staticmethod
    def backward(ctx, g):
        ratio, most, most_at, least, least_at, high, low, w, clipped, by_step = ctx.saved_tensors
        by_scale = (g * by_step).sum(-1, keepdim=True) / ctx.levels
        by_w = g * (w == clipped)
        beyond = g - by_w
        total, signed = beyond.sum(-1, keepdim=True), (beyond * w.sign()).sum(-1, keepdim=True)
        by_high = (signed + total) / 2 + by_scale * (high >= low)
        by_low = (signed - total) / 2 + by_scale * (high < low)
        by_w.scatter_add_(-1, most_at, by_high * ratio[..., 0:1] * (most > 0))
        by_w.scatter_add_(-1, least_at, -by_low * ratio[..., 1:2] * (least > 0))
        return by_w, torch.cat((by_high * most, by_low * least), -1), None


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ratio, levels):
        most, most_at, least, least_at, high, low = _ends(x, ratio)
        scale = (torch.maximum(high, low) / levels).clamp(min=TINY)
        exact = x / scale
        steps = exact.round().clamp_(-levels - 1, levels)
        ctx.save_for_backward(ratio, most, most_at, least, least_at, high, low, exact, steps)
        ctx.levels = levels
        return steps * scale

    @staticmethod
    def backward(ctx, g):
        ratio, most, most_at, least, least_at, high, low, exact, steps = ctx.saved_tensors
        inside = (exact - steps).abs() <= 0.5
        by_scale = (g * torch.where(inside, steps - exact, steps)).sum(-1, keepdim=True) / ctx.levels
        by_high, by_low = by_scale * (high >= low), by_scale * (high < low)
        by_x = g * inside
        by_x.scatter_add_(-1, most_at, by_high * ratio[0] * (most > 0))
        by_x.scatter_add_(-1, least_at, -by_low * ratio[1] * (least > 0))
        return by_x, torch.stack(((by_high * most).sum(), (by_low * least).sum())), None
