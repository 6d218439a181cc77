"""Files of the user's: the cache folder and UTF-8 texts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where PyEngine keeps what it can make again: $XDG_CACHE_HOME/pyengine, else ~/.cache/pyengine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyengine"


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 file; raises ValueError with the first byte that is not."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text: byte 0x{data[e.start]:02x} at offset {e.start}") from e
