"""Rounding as a part that any method can take from another: `--method gwq --rounding gptq`.

A method that chooses transforms or masks leaves the codes to `round_block`. A rounding is a file of this folder with

    complete(spec) -> Spec                                      as of any method; its samples and seq_len where the method has none of its own
    round_matrix(w, spec, mask, statistics, bias, name) -> QTensor
    collect(block, weights, site, inputs, spec) -> dict         optional: linear name → statistics, for the linears of one site
    draft_matrix                                                optional: `round_matrix`, sooner and a little worse

or, where the whole block is learned at once, with

    round_block(block, inputs, spec, masks) -> dict             linear name → QTensor

Sites are rounded in the order they run, and `weights` are the block's with the sites before already quantized, so that statistics
can be those of what the runtime will compute. A method with transforms passes a block whose weights are the merged ones and whose
`forward` applies the transforms: what its hook sees is what the weights multiply. Masks are chosen in that merged basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from ..qtensor import QTensor
from .calibration import chunks, fast_matmul
from .common import Block, Spec


def load_rounding(name: str) -> ModuleType:
    """The file that rounds under this name; ValueError lists those there are."""
    from ..quantizer import load_method, methods

    if name in methods():
        module = load_method(name)
        if hasattr(module, "round_matrix") or hasattr(module, "round_block"):
            return module
    able = (m for m in methods() if hasattr(load_method(m), "round_matrix") or hasattr(load_method(m), "round_block"))
    raise ValueError(f"rounding is {name!r}, expected one of {', '.join(able)}")


def round_block(
    block: Block, inputs: Callable[[], Tensor] | None, spec: Spec, masks: dict[str, Tensor] | None = None, draft: bool = False
) -> dict[str, QTensor]:
    """The quantized linears of a block by name, as `spec.rounding` rounds them; masks bool[n, k] by name say what stays float16.

    `draft`: near that is enough.
    """
    module, masks, weights, done = load_rounding(spec.rounding), masks or {}, dict(block.weights), {}
    if hasattr(module, "round_block"):
        if spec.bits_map and not hasattr(module, "MIXED_BITS"):
            raise ValueError(f"rounding {spec.rounding} takes the same bits for all linears, no bits_map")
        return module.round_block(block, inputs, spec, masks)
    round_matrix = getattr(module, "draft_matrix", module.round_matrix) if draft else module.round_matrix
    for site, names in block.sites.items():
        statistics = module.collect(block, weights, site, inputs, spec) if hasattr(module, "collect") else {}
        for name in names:
            w, bias = block.weights[f"{name}.weight"], block.weights.get(f"{name}.bias")
            done[name] = round_matrix(w, spec.at(block.prefix + name), masks.get(name), statistics.get(name), bias, block.prefix + name)
            weights[f"{name}.weight"] = done[name].dequantize()
    return done


class _Seen(Exception):
    """Ends a block's forward pass where everything that was asked for has been seen."""


def site_inputs(block: Block, weights: dict[str, Tensor], site: str, x: Tensor) -> Iterator[Tensor]:
    """What the linears of a site multiply, f32[windows, t, k] a part at a time, when x[samples, t, hidden] enters the block."""
    seen = []

    def see(name: str, value: Tensor) -> None:
        if name == site:
            seen.append(value)
            raise _Seen

    for part in chunks(x):
        with torch.no_grad(), fast_matmul(), suppress(_Seen):  # and not around the yield, which would switch gradients off for the caller
            block.forward(weights, part, see)
        yield seen.pop().float()


def query_key(block: Block, weights: dict[str, Tensor], x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(queries, keys) after RoPE, f32[windows, heads, t, head_dim] and with key heads, a part at a time, when x[samples, t, hidden] enters."""
    seen = {}

    def edit(what: str, value: Tensor) -> Tensor:
        seen[what] = value
        if what == "key":
            raise _Seen
        return value

    for part in chunks(x):
        with torch.no_grad(), fast_matmul(), suppress(_Seen):
            block.forward(weights, part, None, edit)
        yield seen["query"].float(), seen["key"].float()


def attention(block: Block, weights: dict[str, Tensor], x: Tensor) -> Iterator[Tensor]:
    """f32[heads, t, t] of each window of x[samples, t, hidden]: the share of its attention that a query (row) pays to a key (column)."""
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    for queries, keys in query_key(block, weights, x):
        for q, k in zip(queries, keys, strict=True):
            k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
            yield (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill_(future, -torch.inf).softmax(2)


def complete(spec: Spec, own: str = "rtn", samples: int = 0, seq_len: int = 0) -> Spec:
    """`spec` with its rounding, `own` if none was asked for, and the calibration windows.

    Where spec leaves them open they are as the rounding wants them, or samples x seq_len if it reads no text (0: the method reads none).
    """
    spec = replace(spec, rounding=spec.rounding or own)
    wants = load_rounding(spec.rounding).complete(spec)
    spec = replace(spec, grid=wants.grid)
    if wants.samples:
        return replace(spec, samples=wants.samples, seq_len=wants.seq_len)
    return replace(spec, samples=spec.samples or samples, seq_len=spec.seq_len or seq_len) if samples else replace(spec, samples=0, seq_len=0)


def require_own(spec: Spec, name: str) -> None:
    """ValueError if another rounding is asked for than the method called `name`, which is one itself."""
    if spec.rounding not in (None, name):
        raise ValueError(f"rounding is {spec.rounding!r}, but {name} is a rounding itself; use method {spec.rounding}")


def alone(spec: Spec, name: str, samples: int, seq_len: int) -> Spec:
    """`spec` for a rounding that is the whole method, with its windows; ValueError if another rounding is asked for."""
    require_own(spec, name)
    windows = {"samples": spec.samples or samples, "seq_len": spec.seq_len or seq_len}
    return replace(spec, outliers=0.0, score=None, scope=None, rounding=name, grid=spec.grid or "search", **windows)
