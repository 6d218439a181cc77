"""GGUF files: metadata becomes a config.json, tensors become float32 under Hugging Face names, llama.cpp's row order is undone.

The header is parsed here, each count against the bytes that are left, because the `gguf` package trusts it: a count
of 2^60 has it loop for ever. Block formats are dequantized by the package. Tensors are read, not mapped into memory,
so a file that shrinks while it is open is an error and not a SIGBUS.
"""

from __future__ import annotations

import math
import pkgutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from .. import models
from ..errors import CheckpointError
from . import Checkpoint

DESCRIPTION = "a GGUF file"
MAGIC = b"GGUF"
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
# Bounds far above any model (Gemma has 262,144 tokens, the largest template 20 KB), so that a hostile file ends soon.
MAX_ENTRIES, MAX_STRINGS, MAX_STRING_BYTES = 1 << 16, 1 << 22, 1 << 24
DEQUANTIZED_BYTES = 1 << 24  # of a tensor at once

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
# Architectures whose tensors map by name alone, and whether llama.cpp rotates neighbouring pairs there and so stores
# q and k rows in that order. One that also changes values (Gemma adds 1 to its norms) must not slip through.
INTERLEAVED = {"llama": True, "qwen2": False, "qwen3": False}


@dataclass
class Stored:
    """Where a tensor lies: `shape` with rows first as in torch, `name` as in the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def accepts(path: Path) -> bool:
    """A file that begins with the magic."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read(path: Path) -> Checkpoint:
    """Open the file: parses and checks the header, reads no tensor."""
    with path.open("rb") as file:
        metadata, stored = _Header(file, path.name).parse()
    keys = _Keys(metadata, path.name)
    arch = keys.text("general.architecture")
    supported = sorted(info.name for info in pkgutil.iter_modules(models.__path__) if info.name in INTERLEAVED)
    if arch not in supported:
        raise CheckpointError(f"{path.name}: architecture {arch!r:.80} is not supported ({', '.join(supported)})")
    rope_factors = stored.pop("rope_freqs.weight", None)
    tensors = {_hf_name(name, path.name): s for name, s in stored.items()}
    shapes = {name: s.shape for name, s in tensors.items()}
    config = _config(keys, arch, shapes)
    config["rope_scaling"] = _rope_scaling(keys, arch, None if rope_factors is None else _load(path, rope_factors))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]} if INTERLEAVED[arch] else {}

    def load(name: str) -> Tensor:
        tensor = _load(path, tensors[name])
        part = name.split(".")[-2]
        return _half_split(tensor, heads[part], name) if part in heads else tensor

    return Checkpoint(path, config, "gguf", shapes, load, [path], metadata)


class _Header:
    """A cursor over the header that never takes more bytes than the file has left."""

    def __init__(self, file: BinaryIO, file_name: str) -> None:
        self.file, self.file_name = file, file_name
        self.size = file.seek(0, 2)
        self.at = file.seek(0)
        self.strings = 0

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file_name}: {why}")

    def parse(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        """(metadata by key, tensors by the file's own names)."""
        self.take(4)
        version, tensor_count, entry_count = self.unpack("<IQQ")
        if version not in (2, 3):
            raise self.fail(f"GGUF version {version} is not supported (little-endian 2 and 3 are)")
        for what, count in (("tensors", tensor_count), ("metadata entries", entry_count)):
            if count > MAX_ENTRIES:
                raise self.fail(f"claims {count} {what}")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self.name()
            if key in metadata:
                raise self.fail(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(self.unpack("<I")[0], key)
        stored: dict[str, Stored] = {}
        for _ in range(tensor_count):
            tensor = self.tensor()
            if tensor.name in stored:
                raise self.fail(f"tensor {tensor.name!r} occurs twice")
            stored[tensor.name] = tensor
        self.place(list(stored.values()), metadata.get("general.alignment", 32))
        return metadata, stored

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.fail(f"truncated or damaged: {count} bytes wanted at offset {self.at} of {self.size}")
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail(f"ended early at offset {self.at}")
        self.at += count
        return data

    def unpack(self, form: str) -> tuple:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def string(self) -> str:
        (count,) = self.unpack("<Q")
        if count > MAX_STRING_BYTES:
            raise self.fail(f"claims a string of {count} bytes at offset {self.at}")
        self.strings += 1
        if self.strings > MAX_STRINGS:
            raise self.fail(f"holds more than {MAX_STRINGS} strings")
        try:
            return self.take(count).decode()
        except UnicodeDecodeError as e:
            raise self.fail(f"string at offset {self.at} is not UTF-8: {e.reason}") from e

    def name(self) -> str:
        """A string fit for a line of an error message."""
        at, name = self.at, self.string()
        if not name.isprintable() or not 0 < len(name) <= 256:
            raise self.fail(f"damaged name {name!r:.40} at offset {at}")
        return name

    def value(self, kind: int, key: str) -> Any:
        """A Python scalar, a str, a list of str, or a numpy array."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.unpack("<IQ")
            if kind == STRING:
                if count * 8 > self.size - self.at:
                    raise self.fail(f"{key}: claims {count} strings in {self.size - self.at} bytes")
                return [self.string() for _ in range(count)]
            if kind in SCALARS:
                if count > MAX_STRING_BYTES:
                    raise self.fail(f"{key}: claims {count} values")
                dtype = np.dtype(SCALARS[kind])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind not in SCALARS:
            raise self.fail(f"{key}: unknown value type {kind}")
        dtype = np.dtype(SCALARS[kind])
        number = np.frombuffer(self.take(dtype.itemsize), dtype)[0]
        # The shortest decimal that rounds to this f32, so that 1e-5 is not read as 9.99999974e-06.
        return float(str(number)) if kind == 6 else number.item()

    def tensor(self) -> Stored:
        name = self.name()
        (rank,) = self.unpack("<I")
        if not 1 <= rank <= 4:
            raise self.fail(f"{name}: {rank} dimensions, expected 1 to 4")
        shape = tuple(reversed(self.unpack(f"<{rank}Q")))
        kind, offset = self.unpack("<IQ")
        try:
            kind = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as e:
            raise self.fail(f"{name}: unknown tensor type {kind}") from e
        count = math.prod(shape)
        if count == 0 or shape[-1] % block:
            raise self.fail(f"{name}: shape {list(shape)} does not fit {kind.name}, blocks of {block}")
        return Stored(name, kind, shape, offset, count // block * block_bytes)

    def place(self, tensors: list[Stored], alignment: Any) -> None:
        """Turn offsets into positions. Tensors must fill the rest of the file without gaps, which shows a damaged count or shape."""
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r:.40}, expected a power of two")

        def aligned(position: int) -> int:
            return -(-position // alignment) * alignment

        start = end = aligned(self.at)
        for tensor in sorted(tensors, key=lambda t: t.offset):
            tensor.offset += start
            if tensor.offset != aligned(end):
                raise self.fail(f"{tensor.name}: begins at byte {tensor.offset}, expected {aligned(end)}")
            end = tensor.offset + tensor.nbytes
            if end > self.size:
                raise self.fail(f"{tensor.name}: truncated: ends at byte {end} of {self.size}")
        if self.size > aligned(end):
            raise self.fail(f"{self.size - end} bytes after the last tensor")


@dataclass
class _Keys:
    """Metadata by key, with the type each key must have."""

    metadata: dict[str, Any]
    file: str

    def text(self, key: str, default: str | None = None) -> str:
        return self._typed(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int:
        return self._typed(key, int, default)

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._typed(key, (int, float), default))

    def _typed(self, key: str, kind: Any, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            shown = "missing" if value is None else f"{value!r:.80}"
            raise CheckpointError(f"{self.file}: metadata key {key} is {shown}, expected {getattr(kind, '__name__', 'a number')}")
        return value


def _config(keys: _Keys, arch: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError(f"{keys.file}: token_embd.weight is missing or not a matrix")
    hidden, heads = keys.integer(f"{arch}.embedding_length"), keys.integer(f"{arch}.attention.head_count")
    if heads < 1:
        raise CheckpointError(f"{keys.file}: {arch}.attention.head_count is {heads}")
    head_dim = keys.integer(f"{arch}.attention.key_length", hidden // heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise CheckpointError(f"{keys.file}: {key} is {keys.metadata[key]}, only the key length {head_dim} is supported")
    if keys.integer("split.count", 1) > 1:
        raise CheckpointError(f"{keys.file}: one of {keys.metadata['split.count']} parts; merge the parts into one file first")
    config = {
        "model_type": arch,
        "hidden_size": hidden,
        "intermediate_size": keys.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": keys.integer(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer(f"{arch}.context_length"),
        "rms_norm_eps": keys.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number(f"{arch}.rope.freq_base", 10000.0),
        "vocab_size": embedding[0],
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in shapes,
    }
    for key in ("bos", "eos"):
        if f"tokenizer.ggml.{key}_token_id" in keys.metadata:
            config[f"{key}_token_id"] = keys.integer(f"tokenizer.ggml.{key}_token_id")
    return config


def _rope_scaling(keys: _Keys, arch: str, factors: Tensor | None) -> dict[str, Any] | None:
    """`rope_scaling` of config.json. Llama 3 files hold, instead of its parameters, what each frequency is divided by."""
    kind = keys.text(f"{arch}.rope.scaling.type", "none")
    scaling = None
    if kind != "none":
        scaling = {"rope_type": kind, "factor": keys.number(f"{arch}.rope.scaling.factor")}
    elif f"{arch}.rope.scale_linear" in keys.metadata:
        scaling = {"rope_type": "linear", "factor": keys.number(f"{arch}.rope.scale_linear")}
    if factors is None:
        return scaling
    factors = factors.double().flatten()
    low, high, original = 1.0, 4.0, 8192
    freq = keys.number(f"{arch}.rope.freq_base", 10000.0) ** (-torch.arange(len(factors), dtype=torch.float64) / len(factors))
    blend = ((original * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    factor = float(factors.max())
    if scaling or not torch.allclose(1 / (blend + (1 - blend) / factor), factors, rtol=1e-4):
        raise CheckpointError(f"{keys.file}: rope_freqs.weight is not the scaling of Llama 3.1 or 3.2, the one that is supported")
    if factor == 1:
        return None
    shape = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor, **shape}


def _hf_name(name: str, file: str) -> str:
    """ "blk.3.attn_q.weight" → "model.layers.3.self_attn.q_proj.weight". What has no place would be ignored, so it is refused."""
    part = name.split(".")
    if len(part) == 2 and part[0] in OUTER:
        return f"{OUTER[part[0]]}.{part[1]}"
    if len(part) == 4 and part[0] == "blk" and part[1].isdecimal() and part[2] in INNER:
        return f"model.layers.{part[1]}.{INNER[part[2]]}.{part[3]}"
    raise CheckpointError(f"{file}: tensor {name!r} has no place in the supported models")


def _load(path: Path, stored: Stored) -> Tensor:
    """f32[shape], in the file's row order; dequantized some rows at a time, since the package needs several times what it returns."""
    data = bytearray(stored.nbytes)
    try:
        with path.open("rb") as file:
            file.seek(stored.offset)
            got = file.readinto(data)
    except OSError as e:
        raise CheckpointError(f"{stored.name}: cannot be read: {e.strerror}") from e
    if got != stored.nbytes:
        raise CheckpointError(f"{stored.name}: {got} of {stored.nbytes} bytes left in {path.name}")
    rows = np.frombuffer(data, np.uint8).reshape(math.prod(stored.shape[:-1]), -1)
    values = np.empty((len(rows), stored.shape[-1]), np.float32)
    at_once = max(1, DEQUANTIZED_BYTES // max(1, values[:1].nbytes))
    try:
        with np.errstate(all="ignore"):  # a damaged scale overflows; Checkpoint.float counts the infinities
            for i in range(0, len(rows), at_once):
                values[i : i + at_once] = dequantize(rows[i : i + at_once], stored.kind)
        return torch.from_numpy(values).reshape(stored.shape)
    except NotImplementedError as e:
        raise CheckpointError(f"{stored.name}: tensor type {stored.kind.name} is not supported") from e


def _half_split(rows: Tensor, heads: int, name: str) -> Tensor:
    """Rows of each head from pairs (0, 1), (2, 3)… to halves (0, d/2), (1, d/2 + 1)…: the same rotation in Hugging Face's order."""
    if heads < 1 or rows.shape[0] % (2 * heads):
        raise CheckpointError(f"{name}: {rows.shape[0]} rows do not divide into {heads} heads")
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
