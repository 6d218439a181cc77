"""A PyEngine checkpoint in plain torch, float32: dequantized weights, fake-quantized activations and KV cache. Slow and simple.

It says what the kernels should compute, without their code: `pyengine eval` on the same windows must give nearly the same perplexity.
Unlike `generate`, attention over a whole window reads keys and values that are quantized from the first token on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import models
from ..formats import Checkpoint
from ..loader import quantization, weight
from ..qtensor import QTensor
from .fakequant import quantize_cached, quantize_tokens
from .transforms import kron

HEAD_TOKENS = 512  # rows of logits held at once


class Simulation:
    """The model of a checkpoint, quantized or float, a block in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, act_bits: int | None = None, kv_bits: int | None = None):
        """act_bits and kv_bits None are what the checkpoint asks for."""
        self.checkpoint, self.arch = checkpoint, models.find(checkpoint.config)
        self.config = self.arch.Config.from_dict(checkpoint.config)
        scheme = quantization(checkpoint.config)
        self.act_bits = scheme.get("act_bits", 16) if act_bits is None else act_bits
        self.kv_bits = scheme.get("kv_bits", 16) if kv_bits is None else kv_bits

    def block(self, i: int) -> dict[str, Tensor]:
        """f32 weights, biases and norms of block i by their name inside the block."""
        c, prefix, weights = self.config, f"model.layers.{i}.", {}
        for name in self.arch.LINEARS:
            w, bias = _dense(weight(self.checkpoint, prefix + name, *c.linear_shape(name), c.has_bias(name)))
            weights |= {f"{name}.weight": w} | ({} if bias is None else {f"{name}.bias": bias})
        return weights | {f"{name}.weight": self.checkpoint.float(f"{prefix}{name}.weight", (c.hidden_size,)) for name in self.arch.NORMS}

    def edit(self, i: int) -> Callable[[str, Tensor], Tensor]:
        """What happens to the values of block i between its linears: the `edit` of `block_forward`."""

        def stored(name: str) -> Tensor | None:
            t = self.checkpoint.get(f"model.layers.{i}.{name}")
            return None if t is None else t.float()

        cached = {"key": ("self_attn.k_transform", "self_attn.k_clip"), "value": ("", "self_attn.v_clip"), "query": ("self_attn.q_transform", "")}
        held = {what: [stored(name) for name in names] for what, names in cached.items()}
        held |= {site: [stored(f"{site}.{name}") for name in ("left", "right", "clip")] for site in self.arch.SITES}

        def change(what: str, v: Tensor) -> Tensor:
            if what in self.arch.SITES:
                left, right, clip = held[what]
                v = kron(v, left, right)
                return v if self.act_bits == 16 else quantize_tokens(v, _open(clip), self.act_bits)
            transform, clip = held[what]
            v = v if transform is None else v @ transform
            return v if what == "query" else quantize_cached(v, _open(clip), self.kv_bits)

        return change

    @torch.no_grad()
    def losses(self, windows: Tensor) -> Tensor:
        """−log p of every token of windows i64[samples, t] after the first: f32[samples, t − 1]."""
        c = self.config
        embedding, _ = _dense(weight(self.checkpoint, "model.embed_tokens", c.vocab_size, c.hidden_size))
        head = embedding if c.tie_word_embeddings else _dense(weight(self.checkpoint, "lm_head", c.vocab_size, c.hidden_size))[0]
        x, rope = embedding[windows], self.arch.rope_table(c, windows.shape[1])
        for i in range(c.num_hidden_layers):
            weights, edit = self.block(i), self.edit(i)
            for s in range(len(x)):
                x[s : s + 1] = self.arch.block_forward(weights, x[s : s + 1], c, *rope, None, edit)
        x = self.arch.rms_norm(x, self.checkpoint.float("model.norm.weight", (c.hidden_size,)), c.rms_norm_eps)
        parts = zip(x[:, :-1].flatten(0, 1).split(HEAD_TOKENS), windows[:, 1:].flatten().split(HEAD_TOKENS), strict=True)
        return torch.cat([F.cross_entropy(F.linear(h, head), target, reduction="none") for h, target in parts]).view(len(x), -1)


def _dense(w: QTensor | tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    if isinstance(w, QTensor):
        return w.dequantize(), None if w.bias is None else w.bias.float()
    return w


def _open(clip: Tensor | None) -> Tensor:
    return torch.ones(2) if clip is None else clip
