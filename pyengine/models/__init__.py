"""Model architectures: one file for each `model_type` of config.json, found by its name.

A file exports Config, SITES (linears by the input they share), LINEARS, NORMS, GATED, rope_table, block_forward and rms_norm (of the last
block's output; differentiable torch both, for calibration), Block and Model (on our kernels).
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ..errors import CheckpointError


def find(config: dict) -> ModuleType:
    """The module for a config.json; raises CheckpointError naming those that exist."""
    kind = config.get("model_type")
    known = sorted(m.name for m in pkgutil.iter_modules(__path__))
    if kind not in known:
        raise CheckpointError(f"config.json: model_type {kind!r} is not supported; supported: {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{kind}")
