"""Layers that models are put together from, each quantized or float, all called as `layer(x, residual=None, out=None, program=None, codes=None)`.

`codes` are those of x, for those that multiply codes (see `Linear`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear, stack
from .ops import Program, scatter_add, silu_mul
from .qtensor import QTensor

Codes = tuple[Tensor, Tensor] | None  # of 8 or 4 bits, and a scale f32[m], as `ops.transform` makes them


class Dense(nn.Module):
    """y = x·wᵀ + bias with a float32 w[n, k], for models that are not quantized. torch's matrix product runs it, which no program can record."""

    recordable = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.nbytes, self.weights = weight.numel() * 4, weight.numel()

    def forward(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, program: None = None, codes: Codes = None) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if residual is not None:
            y += residual
        return y if out is None else out.copy_(y)

    def kernel_name(self, tokens: int = 1) -> str:
        return "torch"


class Summed(nn.Module):
    """A linear whose weights are the sum of two matrices, the second over some of the outputs or all."""

    def __init__(self, first: Linear, second: Linear | Summed, rows: Tensor | None):
        super().__init__()
        self.first, self.second, self.rows = first, second, rows
        self.out_features, self.in_features = first.out_features, first.in_features
        for layer in weight_layers(second):
            layer.weights = 0  # they are the first one's: bits per weight count its alone

    def forward(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, program: Program | None = None, codes: Codes = None
    ) -> Tensor:
        """x f32[m, k] → f32[m, n]."""
        y = self.first(x, residual, out, program, codes)
        if self.rows is None:
            return self.second(x, y, y, program, codes)
        scatter_add(self.second(x, program=program, codes=codes), self.rows, y, program=program)
        return y


class SideBySide(nn.Module):
    """Several linears over the same input whose formats differ; their outputs stand side by side."""

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.out_features, self.in_features = sum(p.out_features for p in parts), parts[0].in_features

    def forward(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, program: Program | None = None, codes: Codes = None
    ) -> Tensor:
        y = x.new_empty(x.shape[0], self.out_features) if out is None else out
        at = 0
        for part in self.parts:
            columns = slice(at, at + part.out_features)
            part(x, None if residual is None else residual[:, columns], y[:, columns], program, codes)
            at = columns.stop
        return y


class Gated(nn.Module):
    """silu(g)·u of a layer whose outputs are g beside u, where the layer cannot do it itself."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, out: Tensor | None = None, program: Program | None = None, codes: Codes = None) -> Tensor:
        return silu_mul(self.layer(x, program=program, codes=codes), out=out, program=program)


def linear(
    weights: Sequence[QTensor | tuple[Tensor, Tensor | None]], act_bits: int = 16, kernel: str = "", gated: bool = False, act_clip: Tensor | None = None
) -> nn.Module:
    """One layer for the weights of a site: quantized ones as QTensor, float ones as (w, bias); joined where their formats agree.

    `gated`: the weights are a gate's and what it gates, and the layer returns silu(g)·u. `act_bits` and `act_clip` as in `Linear`, for those
    that are quantized.
    """
    if all(isinstance(w, QTensor) for w in weights):
        joined = weights[0] if len(weights) == 1 else stack(weights)
        if joined is not None and joined.residual is None:
            return Linear(joined, act_bits, kernel, gated, act_clip)
        if joined is not None and not gated:
            first = Linear(replace(joined, residual=None), act_bits, kernel, act_clip=act_clip)
            return Summed(first, linear([joined.residual], act_bits, kernel, act_clip=act_clip), joined.residual.rows)
    if gated:
        return Gated(linear(weights, act_bits, kernel, act_clip=act_clip))
    if not any(isinstance(w, QTensor) for w in weights):
        biases = [b for _, b in weights]
        return Dense(torch.cat([w for w, _ in weights]), None if biases[0] is None else torch.cat(biases))
    return SideBySide([linear([w], act_bits, kernel, act_clip=act_clip) for w in weights])


def weight_layers(module: nn.Module) -> list[Linear | Dense]:
    """The layers of a module that multiply by a weight; `nbytes` of each is what one decode step reads."""
    return [m for m in module.modules() if isinstance(m, (Linear, Dense))]


class Embedding(nn.Module):
    """Rows of a float w[vocab, hidden], or of a quantized linear's weights, which a tied head shares."""

    def __init__(self, weight: Tensor | Linear):
        super().__init__()
        self.weight = weight
        self.recordable = isinstance(weight, Linear)

    def forward(self, token: Tensor, out: Tensor, program: Program | None = None) -> Tensor:
        """token i64[m] → out f32[m, hidden]."""
        if isinstance(self.weight, Linear):
            return self.weight.rows(token, out, program)
        return out.copy_(self.weight[token])
