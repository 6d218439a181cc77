"""Rounding as a part that any method can take from another: `--method gwq --rounding gptq`.

A method that chooses transforms or masks leaves the codes to `round_block`. A rounding is a file of this folder with

    complete(spec) -> Spec                                      as of any method; its samples and seq_len where the method has none of its own
    round_matrix(w, spec, mask, statistics, bias, name) -> QTensor
    collect(block, weights, site, inputs, spec) -> dict         optional: linear name → statistics, for the linears of one site

or, where the whole block is learned at once, with

    round_block(block, inputs, spec, masks) -> dict             linear name → QTensor

Sites are rounded in the order they run, and `weights` are the block's with the sites before already quantized, so that statistics
can be those of what the runtime will compute. A method with transforms passes a block whose weights are the merged ones and whose
`forward` applies the transforms: what its hook sees is what the weights multiply. Masks are chosen in that merged basis.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from ..qtensor import QTensor
from .calibration import chunks
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


def round_block(block: Block, inputs: Callable[[], Tensor] | None, spec: Spec, masks: dict[str, Tensor] | None = None) -> dict[str, QTensor]:
    """The quantized linears of a block by name, as `spec.rounding` rounds them; masks bool[n, k] by name say what stays float16."""
    module, masks, weights, done = load_rounding(spec.rounding), masks or {}, dict(block.weights), {}
    if hasattr(module, "round_block"):
        return module.round_block(block, inputs, spec, masks)
    for site, names in block.sites.items():
        statistics = module.collect(block, weights, site, inputs, spec) if hasattr(module, "collect") else {}
        for name in names:
            w, bias = block.weights[f"{name}.weight"], block.weights.get(f"{name}.bias")
            done[name] = module.round_matrix(w, spec, masks.get(name), statistics.get(name), bias, block.prefix + name)
            weights[f"{name}.weight"] = done[name].dequantize()
    return done


class _Seen(Exception):
    """Ends a block's forward pass at the site that was asked for."""


def site_inputs(block: Block, weights: dict[str, Tensor], site: str, x: Tensor) -> Iterator[Tensor]:
    """What the linears of a site multiply, f32[windows, t, k] a part at a time, when x[samples, t, hidden] enters the block."""
    seen = []

    def see(name: str, value: Tensor) -> None:
        if name == site:
            seen.append(value)
            raise _Seen

    with torch.no_grad():
        for part in chunks(x):
            try:
                block.forward(weights, part, see)
            except _Seen:
                yield seen.pop()


def complete(spec: Spec, own: str = "rtn", samples: int = 0, seq_len: int = 0) -> Spec:
    """`spec` with its rounding, `own` if none was asked for, and the calibration windows.

    Where spec leaves them open they are as the rounding wants them, or samples x seq_len if it reads no text (0: the method reads none).
    """
    spec = replace(spec, rounding=spec.rounding or own)
    wants = load_rounding(spec.rounding).complete(spec)
    if wants.samples:
        return replace(spec, samples=wants.samples, seq_len=wants.seq_len)
    return replace(spec, samples=spec.samples or samples, seq_len=spec.seq_len or seq_len) if samples else replace(spec, samples=0, seq_len=0)
