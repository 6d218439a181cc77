"""What a checkpoint holds: architecture, format, true bits per weight, outliers, size. Reads every tensor, so damage shows too."""

from __future__ import annotations

from types import ModuleType

import torch

from . import models
from .formats import Checkpoint
from .layers import weight_layers
from .loader import quantization


def describe(checkpoint: Checkpoint) -> dict:
    """What the title says, as `pyengine inspect` prints it; of weights and bits what `shares` finds."""
    arch = models.find(checkpoint.config)
    c = arch.Config.from_dict(checkpoint.config)
    sizes = {}
    for name in checkpoint.names():
        t = checkpoint.get(name)
        if t.is_floating_point() and not torch.isfinite(t).all():
            checkpoint.float(name, tuple(t.shape))  # raises, with the count
        sizes[name] = t.numel() * t.element_size()
    found = shares(arch, c, sizes)
    if checkpoint.format == "gguf":  # its tensors come dequantized: the file itself tells what a weight costs there
        found["bits_per_weight"] = None
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
        **found,
        "size_bytes": sum(f.stat().st_size for f in checkpoint.files),
        "quantization": scheme,
    }


def shares(arch: ModuleType, config, sizes: dict[str, int]) -> dict:
    """linear_weights, bits_per_weight and outlier_share of the blocks' linears, from the bytes of a checkpoint's tensors by name.

    The bits count what the blocks hold but for their norms: codes, scales, zeros, outliers, indices and transforms.
    """
    weights = config.num_hidden_layers * sum(n * k for n, k in map(config.linear_shape, arch.LINEARS))
    norms = tuple(f".{name}.weight" for name in arch.NORMS)
    held = {name: size for name, size in sizes.items() if name.startswith("model.layers.") and not name.endswith(norms)}
    outliers = sum(size for name, size in held.items() if name.endswith((".outlier_value", ".column_value"))) // 2
    return {"linear_weights": weights, "bits_per_weight": 8 * sum(held.values()) / weights, "outlier_share": outliers / weights}


def linear_bits(model: torch.nn.Module) -> float:
    """Bits per weight of a loaded model's block linears, with all that `shares` counts but clips, which are some bytes a block."""
    layers = weight_layers(model.blocks)
    held = sum(m.nbytes for m in layers) + sum(block.transform_bytes for block in model.blocks)
    return 8 * held / sum(m.weights for m in layers)
