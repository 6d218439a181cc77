"""Readers of model files: whatever the source, a `Checkpoint` with Hugging Face names for tensors and configuration.

Each module here reads one format and is found by being here. It offers `DESCRIPTION` (what it reads, for error messages),
`accepts(path) -> bool` (cheap) and `read(path) -> Checkpoint`. At most one module accepts a path.
Readers read no tensor before it is asked for, and trust nothing: damage is a CheckpointError with the name of what is damaged.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_JSON = 256 << 20  # bytes; the largest real file of the kind, a tokenizer.json of 262,144 tokens, has 35 MB


@dataclass
class Checkpoint:
    """An opened model: its configuration, and its tensors on demand.

    config    keys named as in Hugging Face's config.json; `model_type` is there
    format    name of the module that read it: "hf", "gguf"
    shapes    shape of every tensor by its Hugging Face name
    load      name → tensor, in the stored dtype (GGUF: float32); raises CheckpointError
    files     every file that `fingerprint` covers
    metadata  key-values of a GGUF file, which holds its tokenizer there; else empty
    release   lets go of the files, whose mapped pages count as this process's memory; the next load opens them again
    """

    path: Path
    config: dict[str, Any]
    format: str
    shapes: dict[str, tuple[int, ...]]
    load: Callable[[str], Tensor]
    files: list[Path]
    metadata: dict[str, Any] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None

    def names(self) -> list[str]:
        """Names of all tensors, such as "model.layers.0.self_attn.q_proj.weight"."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it. CheckpointError where it is absent."""
        if name not in self.shapes:
            raise CheckpointError(f"{name}: missing from {self.path.name}")
        return self.shapes[name]

    def get(self, name: str) -> Tensor | None:
        """The tensor in its stored dtype, None where absent."""
        return self.load(name) if name in self.shapes else None

    def float(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """f32[shape]: CheckpointError where the tensor is absent, of another shape, not floating point or not finite."""
        stored = self.shape(name)
        if stored != tuple(shape):
            raise CheckpointError(f"{name}: shape {list(stored)}, expected {list(shape)}")
        tensor = self.load(name)
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{name}: dtype {str(tensor.dtype)[6:]}, expected float16, bfloat16 or float32")
        tensor = tensor.float()
        # The extremes take no memory, which isfinite() does; they are NaN where any value is.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(f"{name}: {int((~tensor.isfinite()).sum())} of {tensor.numel()} values are NaN or infinite")
        return tensor

    def fingerprint(self) -> str:
        """16 hex digits over the names, sizes, first and last 64 KiB of the files: the same on every machine, for cache keys."""
        digest = hashlib.sha256()
        for path in sorted(self.files):
            with path.open("rb") as file:
                size = file.seek(0, 2)
                digest.update(f"{path.name}\0{size}\0".encode())
                for start in (0, max(0, size - 65536)):
                    file.seek(start)
                    digest.update(file.read(65536))
        return digest.hexdigest()[:16]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model with the reader that accepts it; CheckpointError says what was found where none does."""
    path = Path(path)
    readers = _readers()
    try:
        for reader in readers:
            if reader.accepts(path):
                return reader.read(path)
        found = _found(path)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    raise CheckpointError(f"{path}: {found}; supported are: {', '.join(reader.DESCRIPTION for reader in readers)}")


def _readers() -> list[ModuleType]:
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return [module for module in modules if hasattr(module, "accepts")]


def _found(path: Path) -> str:
    if path.is_dir():
        method = quant_method(path)
        return f"a directory with weights quantized by {method!r}" if method else "a directory without config.json"
    if not path.is_file():
        return "not a regular file or directory" if path.exists() else "no such file or directory"
    with path.open("rb") as file:
        return f"a file of {path.stat().st_size} bytes that begins with {file.read(4)!r}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError names the file if it is not there, not JSON or not an object."""
    if not path.is_file():
        raise CheckpointError(f"{path.name}: missing from {path.parent}")
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes, more than {MAX_JSON}")
        value = json.loads(path.read_bytes())
    except (OSError, RecursionError, ValueError) as e:
        raise CheckpointError(f"{path.name}: cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: holds a {type(value).__name__}, expected an object")
    return value


def quant_method(directory: Path) -> str | None:
    """`quantization_config.quant_method` of a directory's config.json; None where there is none or it cannot be read."""
    try:
        scheme = read_json(directory / "config.json").get("quantization_config")
    except CheckpointError:
        return None
    method = scheme.get("quant_method") if isinstance(scheme, dict) else None
    return None if method is None else str(method)
