"""`pyengine::linear`: what torch sees of `Linear` when it compiles, exports, transforms, fakes or differentiates it.

The weights are arguments like x, so torch knows what the op reads and keeps it alive, layers of one form share a compiled graph, and a graph
holds no secret of this process:

    pyengine::linear(Tensor x, Tensor[] weights, str[] names, int[] form, str kernel) -> Tensor

x [..., k]; `weights` are a layer's packed tensors and `names` the fields of a native QLinear that they stand for; `form` has the values of
`ops.FORM`. `pyengine::linear.out` writes to `out` [m, n] instead. Weights are taken on trust: they come from a Linear. Eager calls go past
all this, which costs some microseconds, to `ops.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import _C, ops

if TYPE_CHECKING:
    from .linear import Linear

ARGUMENTS = "Tensor x, Tensor[] weights, str[] names, int[] form, str kernel"
N, K, GATED = (ops.FORM.index(field) for field in ("n", "k", "gated"))

library = torch.library.Library("pyengine", "DEF")
library.define(f"linear({ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
library.define(f"linear.out({ARGUMENTS}, *, Tensor(a!) out) -> ()", tags=torch.Tag.pt2_compliant_tag)
library.define("no_backward(Tensor grad, int k) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def traced(x: Tensor) -> bool:
    """Whether torch must see the op: it traces, transforms or differentiates, or x has no memory of its own."""
    return (
        torch.compiler.is_compiling()
        or (type(x) is not Tensor and type(x) is not nn.Parameter)
        or (x.requires_grad and torch.is_grad_enabled())
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def arguments(layer: Linear) -> tuple[list[Tensor], Sequence[str], Sequence[int], str]:
    """What the op takes beside x."""
    return [getattr(layer, f"packed_{name}") for name in layer.names], layer.names, layer.form, layer.kernel


def linear(layer: Linear, x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
    """Forward of a layer by the op."""
    if out is None:
        y = torch.ops.pyengine.linear(x, *arguments(layer))
        return y if residual is None else y + residual
    if residual is not None or x.requires_grad:
        raise ValueError("Linear: with `out` torch can neither trace a residual nor differentiate")
    torch.ops.pyengine.linear.out(x, *arguments(layer), out=out)
    return out


def _run(x: Tensor, weights: Sequence[Tensor], names: Sequence[str], form: Sequence[int], kernel: str, out: Tensor | None = None) -> Tensor:
    op = _C.QLinear()
    for field, value in zip(ops.FORM, form):
        setattr(op, field, value)
    ops.point(op, dict(zip(names, weights)))
    return ops.linear(op, x, weights, weights[0].device, out=out, kernel=kernel)


def _run_out(x: Tensor, weights: Sequence[Tensor], names: Sequence[str], form: Sequence[int], kernel: str, *, out: Tensor) -> None:
    _run(x, weights, names, form, kernel, out)


def _fake(x: Tensor, weights: Sequence[Tensor], names: Sequence[str], form: Sequence[int], kernel: str) -> Tensor:
    ops.check_input(x, form[K], weights[0].device)
    return x.new_empty(*x.shape[:-1], form[N] // 2 if form[GATED] else form[N])


def _fake_out(x: Tensor, weights: Sequence[Tensor], names: Sequence[str], form: Sequence[int], kernel: str, *, out: Tensor) -> None:
    ops.check_input(x, form[K], weights[0].device)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.k, ctx.weights = inputs[3][K], len(inputs[1])


def _backward(ctx, grad: Tensor) -> tuple:
    return torch.ops.pyengine.no_backward(grad, ctx.k), [None] * ctx.weights, None, None, None


def _no_backward(grad: Tensor, k: int) -> Tensor:
    raise RuntimeError("pyengine.Linear has no backward pass: its weights are quantized for inference")


def _vmap(info, in_dims: tuple, x: Tensor, weights: Sequence[Tensor], names: Sequence[str], form: Sequence[int], kernel: str) -> tuple[Tensor, int]:
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1]):
        raise NotImplementedError("pyengine::linear: vmap over x alone is supported, not over weights")
    return torch.ops.pyengine.linear(x.movedim(in_dims[0], 0), weights, names, form, kernel), 0


for device in ("CPU", "CUDA"):
    library.impl("linear", _run, device)
    library.impl("linear.out", _run_out, device)
    library.impl("no_backward", _no_backward, device)
torch.library.register_fake("pyengine::linear", _fake, lib=library)
torch.library.register_fake("pyengine::linear.out", _fake_out, lib=library)
torch.library.register_fake("pyengine::no_backward", lambda grad, k: grad.new_empty(*grad.shape[:-1], k), lib=library)
torch.library.register_autograd("pyengine::linear", _backward, setup_context=_remember, lib=library)
torch.library.register_vmap("pyengine::linear", _vmap, lib=library)
