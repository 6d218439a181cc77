"""Hugging Face directories: config.json beside safetensors, one file or shards under an index. PyEngine's own checkpoints too.

Our own index carries `metadata.crc32`, zlib.crc32 over each tensor's bytes as stored, in eight hex digits: safetensors itself
notices a short file but not a flipped bit. A tensor that the table lists is verified whenever it is read.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from . import Checkpoint, quant_method, read_json

DESCRIPTION = "a Hugging Face directory (config.json and *.safetensors)"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files beside the weights that change what a model does, so that caches must notice a change.
SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


def accepts(path: Path) -> bool:
    """A directory with config.json whose weights are float or our own; other methods have readers of their own."""
    return path.is_dir() and (path / "config.json").exists() and quant_method(path) in (None, "pyengine")


def read(path: Path) -> Checkpoint:
    """Open the directory: checks the configuration and every shard's header, reads no tensor."""
    config = read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"config.json: model_type is {config.get('model_type')!r}, expected a name such as 'llama'")
    index: dict[str, Any] = {}
    if (path / INDEX).exists():
        index = read_json(path / INDEX)
        shard_of = _shard_of(index)
    else:
        shard_of = dict.fromkeys(_open(path, SINGLE).keys(), SINGLE)
    shards = {name: _open(path, name) for name in sorted(set(shard_of.values()))}
    shapes = {}
    listed = {name: set(shard.keys()) for name, shard in shards.items()}
    for name, shard in shard_of.items():
        if not name.isprintable():
            raise CheckpointError(f"{shard}: damaged tensor name {name!r:.80}")
        if name not in listed[shard]:
            raise CheckpointError(f"{name}: {INDEX} places it in {shard}, which does not hold it")
        shapes[name] = tuple(shards[shard].get_slice(name).get_shape())
    checksums = _checksums(index)

    def load(name: str) -> Tensor:
        shard = shard_of[name]
        if shard not in shards:
            shards[shard] = _open(path, shard)
        return _load(shards[shard], name, shapes[name], checksums.get(name))

    files = [path / name for name in (*SIDE_FILES, INDEX, *shards) if (path / name).is_file()]
    return Checkpoint(path, config, "hf", shapes, load, files, release=shards.clear)


def _shard_of(index: dict[str, Any]) -> dict[str, str]:
    """The index' `weight_map`, tensor name → file name, with every file inside the directory."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX}: weight_map is missing, empty or not an object")
    for name, shard in weight_map.items():
        # Only the name is held inside the directory: download caches make the file itself a link to elsewhere.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise CheckpointError(f"{name!r}: {INDEX} places it in {shard!r:.80}, which is not the name of a safetensors file beside it")
    return weight_map


def _checksums(index: dict[str, Any]) -> dict[str, int]:
    metadata = index.get("metadata")
    table = metadata.get("crc32", {}) if isinstance(metadata, dict) else {}
    try:
        return {name: int(value, 16) for name, value in table.items()}
    except (AttributeError, TypeError, ValueError) as e:
        raise CheckpointError(f"{INDEX}: metadata.crc32 must give each tensor eight hex digits: {e}") from e


def _open(path: Path, name: str) -> Any:
    """The opened shard; safetensors checks that header and file size agree."""
    file = path / name
    if not file.is_file():
        pickles = next(path.glob("*.bin"), None)
        if name == SINGLE and pickles is not None:
            raise CheckpointError(f"{pickles.name}: pickled weights can run code and are not read; convert the model to safetensors")
        raise CheckpointError(f"{name}: missing from {path}")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{name}: damaged or not safetensors: {e}") from e


def _load(shard: Any, name: str, shape: tuple[int, ...], checksum: int | None) -> Tensor:
    try:
        tensor = shard.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{name}: cannot be read: {e}") from e
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name}: shape {list(tensor.shape)} in the file, {list(shape)} in its header")
    if checksum is not None:
        actual = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        if actual != checksum:
            raise CheckpointError(f"{name}: damaged: checksum {actual:08x}, expected {checksum:08x}")
    return tensor
