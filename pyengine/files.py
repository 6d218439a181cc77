"""Files of the user's: the cache folder, UTF-8 texts, JSON."""

from __future__ import annotations

import json
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


def read_json(path: str | os.PathLike) -> object:
    """The value in a JSON file; raises ValueError that says where it is broken."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON: {e}") from e
