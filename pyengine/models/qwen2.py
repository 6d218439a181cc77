"""Qwen2 and Qwen2.5: Llama with a bias on query, key and value, and on no other linear, whatever config.json says."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CheckpointError
from . import llama
from .llama import GATED, LINEARS, NORMS, SITES, Block, Model, block_forward, rms_norm, rope_table

__all__ = ["GATED", "LINEARS", "NORMS", "SITES", "Block", "Config", "Model", "block_forward", "rms_norm", "rope_table"]


@dataclass
class Config(llama.Config):
    """The keys of config.json that the model reads, with the defaults of Qwen2."""

    max_position_embeddings: int = 32768
    use_sliding_window: bool = False

    def _check(self) -> Config:
        if self.use_sliding_window:
            raise CheckpointError("config.json: use_sliding_window is true, but attention here always sees the whole context")
        return super()._check()

    def has_bias(self, name: str) -> bool:
        return name in SITES["attn_in"]
