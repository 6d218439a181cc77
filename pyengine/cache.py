"""The KV cache: keys and values in slots, one slot a sequence, and the rows of a forward pass that read and write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import memory
from .ops import KV_DTYPES


class LayerCache(NamedTuple):
    """One layer's keys and values, each f16[slot, kv_head, length, head_dim]; or codes with the scales of both, f32[slot, kv_head, length]:
    i8 in the same places, or for 4 bits u8[slot, kv_head, length, head_dim/2] with the zero codes of both, u8[slot, kv_head, length]."""

    k: Tensor
    v: Tensor
    scale: tuple[Tensor, ...] | None = None


class KVCache:
    """f16[layer, 2, slot, kv_head, length, head_dim]; true GQA, so keys are never repeated for the query heads that share them.

    With 8 bits these are i8 codes beside scales f32[layer, 2, slot, kv_head, length]: about half the memory. With 4 bits two codes share a
    byte, and a zero code u8 stands beside each scale: 0.29 of it at head_dim 64.
    """

    def __init__(self, layers: int, slots: int, kv_heads: int, length: int, head_dim: int, bits: int = 16):
        self.slots, self.length, self.bits = slots, length, bits
        shape = (layers, 2, slots, kv_heads, length)
        self.data = memory.empty(*shape, head_dim // 2 if bits == 4 else head_dim, dtype=KV_DTYPES[bits])
        self.scale = memory.empty(*shape) if bits < 16 else None
        self.zero = memory.empty(*shape, dtype=torch.uint8) if bits == 4 else None
        parts = [p for p in (self.scale, self.zero) if p is not None]
        self.tensors = (self.data, *parts)
        self._layers = [LayerCache(*self.data[i], tuple(t for p in parts for t in p[i]) or None) for i in range(layers)]

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]

    def copy(self, slot: int, to: slice, length: int) -> None:
        """The first `length` tokens of a slot into others: sequences that begin alike need not each compute it."""
        for t in self.tensors:
            t[:, :, to, :, :length] = t[:, :, slot : slot + 1, :, :length]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


@dataclass
class Batch:
    """The rows of one forward pass, from any mix of sequences: token, slot and position of each, all i32[m] (token i64[m]).

    Rows of one slot stand together with rising positions. `wanted` picks the rows whose logits are needed; None is all.
    """

    token: Tensor
    slot: Tensor
    position: Tensor
    wanted: Tensor | None = None

    @classmethod
    def of(cls, token: list[int], slot: list[int], position: list[int], cache: KVCache, wanted: list[int] | None = None) -> Batch:
        """Refuses rows that do not fit the cache: kernels trust slots and positions."""
        if min(position) < 0 or max(position) >= cache.length:
            raise ValueError(f"position {max(position)} does not fit a KV cache of {cache.length} tokens")
        if min(slot) < 0 or max(slot) >= cache.slots:
            raise ValueError(f"slot {max(slot)} does not exist in a KV cache of {cache.slots} slots")
        return cls(
            torch.tensor(token, dtype=torch.int64),
            torch.tensor(slot, dtype=torch.int32),
            torch.tensor(position, dtype=torch.int32),
            None if wanted is None else torch.tensor(wanted, dtype=torch.int64),
        )
