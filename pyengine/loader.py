"""From a checkpoint on disk to a model that runs: reads weights block by block, quantized or float, and packs them for this machine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import demo, models, ops
from .engine import Engine
from .errors import CheckpointError
from .formats import Checkpoint, open_checkpoint
from .layers import Embedding, linear
from .linear import Linear
from .qtensor import QTensor
from .tokenizer import load_tokenizer


def load(
    model: str | Path | None = None, device: str = "auto", *, threads: int | None = None, kv_bits: int | None = None, kernel: str = "", progress: bool = False
) -> Engine:
    """Load a model for generation.

    model: a Hugging Face directory, a GGUF file or a PyEngine checkpoint; None is the demo model, quantized at first use.
    device: "auto" or "cpu". kv_bits: of the KV cache, 16 or 8; None is what the checkpoint asks for, else 16. threads: of our kernels and
    torch; None keeps the current number. kernel: forces a row of the dispatch table for all quantized linears. Raises CheckpointError for
    a damaged or unsupported checkpoint, ValueError for wrong arguments.
    """
    if device not in ("auto", "cpu"):
        raise ValueError(f"device is {device!r}; this build has kernels for 'cpu' ('auto' picks it)")
    if kv_bits not in (None, 8, 16):
        raise ValueError(f"kv_bits is {kv_bits}; the KV cache holds 16 or 8")
    if threads is not None:
        ops.set_threads(threads)
    checkpoint = open_checkpoint(model if model is not None else demo.quantized())
    engine = Engine(build(checkpoint, kernel, progress, kv_bits), load_tokenizer(checkpoint), checkpoint)
    checkpoint.release()
    return engine


def build(checkpoint: Checkpoint, kernel: str = "", progress: bool = False, kv_bits: int | None = None) -> torch.nn.Module:
    """The model of a checkpoint, its weights packed. `kernel` and `kv_bits` as in `load`."""
    arch = models.find(checkpoint.config)
    c = arch.Config.from_dict(checkpoint.config)
    scheme = quantization(checkpoint.config)
    act_bits = scheme.get("act_bits", 16)
    if act_bits not in (8, 16):
        raise CheckpointError(f"config.json: act_bits is {act_bits!r}, these kernels take 8 or 16")
    asked = scheme.get("kv_bits", 16)
    if asked not in (8, 16):
        raise CheckpointError(f"config.json: kv_bits is {asked!r}, the KV cache holds 16 or 8")
    blocks = []
    for i in tqdm(range(c.num_hidden_layers), desc="load", unit="block", disable=not progress, leave=False, delay=2):
        prefix = f"model.layers.{i}"
        norms = [checkpoint.float(f"{prefix}.{name}.weight", (c.hidden_size,)).clone() for name in arch.NORMS]  # a view would hold the file
        linears = [
            linear([weight(checkpoint, f"{prefix}.{name}", *c.linear_shape(name), c.has_bias(name)) for name in names], act_bits, kernel, site in arch.GATED)
            for site, names in arch.SITES.items()
        ]
        blocks.append(arch.Block(c, norms, linears))
    table = weight(checkpoint, "model.embed_tokens", c.vocab_size, c.hidden_size)
    tied = linear([table], 16, kernel)
    head = tied if c.tie_word_embeddings else linear([weight(checkpoint, "lm_head", c.vocab_size, c.hidden_size)], 16, kernel)
    norm = checkpoint.float("model.norm.weight", (c.hidden_size,)).clone()
    return arch.Model(c, Embedding(tied if isinstance(tied, Linear) else tied.weight), blocks, norm, head, asked if kv_bits is None else kv_bits)


def weight(checkpoint: Checkpoint, name: str, n: int, k: int, bias: bool = False) -> QTensor | tuple[Tensor, Tensor | None]:
    """The n × k weight of a module: a QTensor if the checkpoint holds a scale for it, else (w f32[n, k], bias)."""
    if (f"{name}.bias" in checkpoint.shapes) != bias:
        raise CheckpointError(f"{name}.bias: {'missing' if bias else 'there'}, but config.json says that the layer has {'one' if bias else 'none'}")
    if f"{name}.scale" in checkpoint.shapes:
        return QTensor.read(name, n, k, checkpoint.get)
    return checkpoint.float(f"{name}.weight", (n, k)).contiguous(), checkpoint.float(f"{name}.bias", (n,)) if bias else None


def quantization(config: dict) -> dict:
    """The quantization_config of a config.json, {} for a float model; refuses methods of others."""
    scheme = config.get("quantization_config") or {}
    if not isinstance(scheme, dict):
        raise CheckpointError(f"config.json: quantization_config is {type(scheme).__name__}, expected an object")
    if scheme and scheme.get("quant_method") != "pyengine":
        method = scheme.get("quant_method")
        raise CheckpointError(f"config.json: the checkpoint is quantized by {method!r}, which is not supported; give the float model instead")
    return scheme
