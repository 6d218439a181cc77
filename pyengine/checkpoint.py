"""Writing PyEngine checkpoints so that a crash, a full disk or Ctrl-C never leaves one that loads.

OUT.partial collects safetensors shards, one a part of the model, and its folder `work` whatever a method keeps between
steps. Every file is written under a temporary name, flushed to the disk and renamed. `config.json`, without which nothing
loads, is written last; then the directory is renamed to OUT. Nothing in a file depends on the time or the order of a
dictionary: the same inputs give the same bytes on the same kind of CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

DTYPES = {  # as safetensors names them
    torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
    torch.float32: "F32", torch.int64: "I64", torch.float64: "F64",
}  # fmt: skip
SINGLE_FILE_BYTES = 512 << 20  # up to here the shards become one model.safetensors


def write_file(path: Path, chunks: Iterable) -> None:
    """Write the bytes-like chunks to `path`: all of them, on the disk, or nothing under that name."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        for chunk in chunks:
            f.write(chunk)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def require_free(out: str | os.PathLike) -> None:
    """Raise ValueError if `out` exists and is not an empty directory."""
    path = Path(out)
    if path.is_symlink() or path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty directory; nothing is overwritten")


class Writer:
    """A checkpoint under construction: `write` each part, then `finish`."""

    def __init__(self, out: str | os.PathLike, parts: int, identity: dict, resume: bool = False):
        """`identity` says what makes two runs the same (source, calibration, options), as JSON-able values.

        Raises ValueError if `out` exists and is not an empty directory, if OUT.partial is not ours to replace, or if
        `resume` finds the work of a run with another identity. Resuming where nothing was left starts afresh.
        """
        require_free(out)
        self.out, self.parts = Path(os.path.abspath(out)), parts
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.work = self.partial / "work"
        state = self.work / "run.json"
        if self.partial.exists():
            others = (p for p in self.partial.rglob("*") if not p.is_dir() and p.name != "run.json.tmp")
            if not self.partial.is_dir() or not state.exists() and any(others):
                raise ValueError(f"{self.partial}: is in the way and was not left by a quantization; move it away")
            if resume and state.exists():
                _require_same(self.partial, json.loads(state.read_text()), identity)
                return
            shutil.rmtree(self.partial)
        self.work.mkdir(parents=True)
        write_file(state, (_json(identity),))

    def has(self, part: int) -> bool:
        """Whether this part is finished, now or in the run that is resumed."""
        return self._single.exists() or self._shard(part).exists()

    def write(self, part: int, tensors: dict[str, Tensor]) -> None:
        write_file(self._shard(part), _safetensors(tensors))

    def read(self, part: int) -> dict[str, Tensor]:
        """The tensors of a part that is finished, before `finish`."""
        return _read(self._shard(part))

    def finish(self, config: dict, save_tokenizer: Callable[[Path], object]) -> dict[str, int]:
        """Merge small shards, write index, tokenizer and config, move everything to OUT. Returns the bytes of each tensor."""
        shards = [self._shard(i) for i in range(self.parts)]
        if not self._single.exists() and sum(s.stat().st_size for s in shards) <= SINGLE_FILE_BYTES:
            write_file(self._single, _safetensors({name: t for shard in shards for name, t in _read(shard).items()}))
        if self._single.exists():
            for shard in shards:
                shard.unlink(missing_ok=True)
            shards = [self._single]
        sizes = self._write_index(shards)
        save_tokenizer(self.partial)
        for file in self.partial.iterdir():
            _sync(file)
        write_file(self.partial / "config.json", (_json(config),))
        os.rename(self.partial, self.out)
        _sync(self.out.parent)
        shutil.rmtree(self.out / "work")
        return sizes

    def _write_index(self, shards: list[Path]) -> dict[str, int]:
        sizes, sums, where = {}, {}, {}
        for shard in shards:
            for name, t in _read(shard).items():
                raw = memoryview(t.contiguous().flatten().view(torch.uint8).numpy())
                sizes[name], sums[name], where[name] = raw.nbytes, f"{zlib.crc32(raw):08x}", shard.name
        metadata = {"total_size": sum(sizes.values()), "crc32": sums}
        write_file(self.partial / "model.safetensors.index.json", (_json({"metadata": metadata, "weight_map": where}),))
        return sizes

    @property
    def _single(self) -> Path:
        return self.partial / "model.safetensors"

    def _shard(self, part: int) -> Path:
        return self.partial / f"model-{part + 1:05d}-of-{self.parts:05d}.safetensors"


def _require_same(partial: Path, stored: dict, wanted: dict) -> None:
    wanted = json.loads(_json(wanted))
    keys = sorted(stored.keys() | wanted.keys())
    different = [f"{k} was {stored.get(k)}, is {wanted.get(k)}" for k in keys if stored.get(k) != wanted.get(k)]
    if different:
        raise ValueError(f"{partial}: cannot resume, this is another run: {'; '.join(different)}")


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _safetensors(tensors: dict[str, Tensor]) -> Iterator:
    """A safetensors file in pieces, from where the tensors lie: the library's save() holds all of them twice, its save_file() picks name and mode.

    u64 length of the header, the header in JSON, the tensors; those of wide dtypes first, which leaves all of them aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        t = tensors[name]
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield memoryview(tensors[name].contiguous().flatten().view(torch.uint8).numpy())


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in sorted(f.keys())}
    except SafetensorError as e:
        raise CheckpointError(f"{path}: damaged since it was written ({e}); start again without resuming") from e


def _sync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
