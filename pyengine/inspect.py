"""What a checkpoint holds: architecture, format, true bits per weight, outliers, size. Reads every tensor, so damage shows too."""

from __future__ import annotations

import torch

from . import models
from .formats import Checkpoint
from .layers import weight_layers
from .loader import quantization


def describe(checkpoint: Checkpoint) -> dict:
    """bits_per_weight counts what the blocks hold but for their norms, with scales, zeros, outliers, indices and transforms, and outlier_share
    the outliers among the linears' weights, both from the bytes in the file."""
    arch = models.find(checkpoint.config)
    c = arch.Config.from_dict(checkpoint.config)
    norms = tuple(f".{name}.weight" for name in arch.NORMS)
    weights = c.num_hidden_layers * sum(n * k for n, k in map(c.linear_shape, arch.LINEARS))
    linear_bytes = outliers = 0
    for name in checkpoint.names():
        t = checkpoint.get(name)
        if t.is_floating_point() and not torch.isfinite(t).all():
            checkpoint.float(name, tuple(t.shape))  # raises, with the count
        size = t.numel() * t.element_size()
        if name.startswith("model.layers.") and not name.endswith(norms):
            linear_bytes += size
            outliers += t.numel() if name.endswith((".outlier_value", ".column_value")) else 0
    on_disk = sum(f.stat().st_size for f in checkpoint.files)
    if checkpoint.format == "gguf":  # its tensors come dequantized: the file itself tells what a weight costs there
        linear_bytes = None
    scheme = quantization(checkpoint.config)
    return {
        "path": str(checkpoint.path),
        "format": "pyengine" if scheme else checkpoint.format,
        "architecture": checkpoint.config["model_type"],
        "layers": c.num_hidden_layers,
        "hidden_size": c.hidden_size,
        "heads": [c.num_attention_heads, c.num_key_value_heads],
        "vocabulary": c.vocab_size,
        "context": c.max_position_embeddings,
        "linear_weights": weights,
        "bits_per_weight": None if linear_bytes is None else 8 * linear_bytes / weights,
        "outlier_share": outliers / weights,
        "size_bytes": on_disk,
        "quantization": scheme,
    }


def linear_bits(model: torch.nn.Module) -> float:
    """Bits per weight of a loaded model's block linears, with scales, zeros, outliers and their indices."""
    layers = weight_layers(model.blocks)
    return 8 * sum(m.nbytes for m in layers) / sum(m.weights for m in layers)
