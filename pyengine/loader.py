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
from .transforms import read_heads, read_site

BITS = (16, 8, 4)  # of activations and of the KV cache


def load(
    model: str | Path | None = None, device: str = "auto", *, threads: int | None = None, act_bits: int | None = None,
    kv_bits: int | None = None, kernel: str = "", progress: bool = False,
) -> Engine:  # fmt: skip
    """Load a model for generation.

    model: a Hugging Face directory, a GGUF file or a PyEngine checkpoint; None is the demo model, quantized at first use.
    device: "auto" or "cpu". act_bits and kv_bits: of the activations that quantized linears read, and of the KV cache; 16, 8 or 4,
    None is what the checkpoint asks for, else 16. They hold for every token, so that a prompt and what follows it see the same model.
    threads: of our kernels and torch; None keeps the current number. kernel: forces a row of the dispatch table for all quantized linears.
    Raises CheckpointError for a damaged or unsupported checkpoint, ValueError for wrong arguments.
    """
    if device not in ("auto", "cpu"):
        raise ValueError(f"device is {device!r}; this build has kernels for 'cpu' ('auto' picks it)")
    for name, value in (("act_bits", act_bits), ("kv_bits", kv_bits)):
        if value not in (None, *BITS):
            raise ValueError(f"{name} is {value}, expected 16, 8 or 4")
    if threads is not None:
        ops.set_threads(threads)
    checkpoint = open_checkpoint(model if model is not None else demo.quantized())
    engine = Engine(build(checkpoint, kernel, progress, kv_bits, act_bits), load_tokenizer(checkpoint), checkpoint)
    checkpoint.release()
    return engine


def build(
    checkpoint: Checkpoint, kernel: str = "", progress: bool = False, kv_bits: int | None = None, act_bits: int | None = None
) -> torch.nn.Module:
    """The model of a checkpoint, its weights packed. `kernel`, `kv_bits` and `act_bits` as in `load`."""
    arch = models.find(checkpoint.config)
    c = arch.Config.from_dict(checkpoint.config)
    scheme = quantization(checkpoint.config)
    act_bits, kv_bits = _bits(scheme, "act_bits", act_bits), _bits(scheme, "kv_bits", kv_bits)
    blocks = []
    for i in tqdm(range(c.num_hidden_layers), desc="load", unit="block", disable=not progress, leave=False, delay=2):
        prefix = f"model.layers.{i}"
        norms = [checkpoint.float(f"{prefix}.{name}.weight", (c.hidden_size,)).clone() for name in arch.NORMS]  # a view would hold the file
        linears, transforms = [], []
        for site, names in arch.SITES.items():
            transform, clip = read_site(checkpoint, f"{prefix}.{site}", c.linear_shape(names[0])[1])
            weights = [weight(checkpoint, f"{prefix}.{name}", *c.linear_shape(name), c.has_bias(name)) for name in names]
            linears.append(linear(weights, act_bits, kernel, site in arch.GATED, clip))
            transforms.append(transform)
        blocks.append(arch.Block(c, norms, linears, transforms, read_heads(checkpoint, f"{prefix}.self_attn", c.head_dim)))
    table = weight(checkpoint, "model.embed_tokens", c.vocab_size, c.hidden_size)
    if isinstance(table, QTensor) and table.residual is not None:
        raise CheckpointError("model.embed_tokens.residual: an embedding takes no residual")
    tied = linear([table], 16, kernel)
    head = tied if c.tie_word_embeddings else linear([weight(checkpoint, "lm_head", c.vocab_size, c.hidden_size)], 16, kernel)
    norm = checkpoint.float("model.norm.weight", (c.hidden_size,)).clone()
    return arch.Model(c, Embedding(tied if isinstance(tied, Linear) else tied.weight), blocks, norm, head, kv_bits)


def _bits(scheme: dict, name: str, wanted: int | None) -> int:
    """What the caller wants, else what a quantization_config says, else 16."""
    stored = scheme.get(name, 16)
    if type(stored) is not int or stored not in BITS:
        raise CheckpointError(f"config.json: {name} is {stored!r}, expected 16, 8 or 4")
    return stored if wanted is None else wanted


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
