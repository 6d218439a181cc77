"""GWQ as the paper describes it: the largest |gradient| of a single sample. `gwq` is the same with better statistics."""

from __future__ import annotations

from dataclasses import replace

from . import rounding
from .common import Spec
from .gwq import MIXED_BITS, prepare, quantize_block

__all__ = ["MIXED_BITS", "complete", "prepare", "quantize_block"]


def complete(spec: Spec) -> Spec:
    """`spec` with the paper's score and sample count; ValueError if another score is asked for."""
    if spec.score not in (None, "abs_g"):
        raise ValueError(f"score is {spec.score!r}, but gwq-paper ranks by abs_g; use method gwq for other scores")
    return rounding.complete(replace(spec, score="abs_g", scope=spec.scope or "tensor", samples=1, seq_len=spec.seq_len or 512), "rtn", 1, 512)
