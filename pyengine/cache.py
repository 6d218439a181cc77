"""The KV cache: f16 keys and values in slots, one slot a sequence, and the rows of a forward pass that read and write it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import memory
from .ops import KV_DTYPE


class KVCache:
    """f16[layer, 2, slot, kv_head, length, head_dim]; true GQA, so keys are never repeated for the query heads that share them."""

    def __init__(self, layers: int, slots: int, kv_heads: int, length: int, head_dim: int):
        self.slots, self.length = slots, length
        self.data = memory.empty(layers, 2, slots, kv_heads, length, head_dim, dtype=KV_DTYPE)
        self._views = [(layer[0], layer[1]) for layer in self.data]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of one layer, each f16[slot, kv_head, length, head_dim]."""
        return self._views[index]

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()


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
