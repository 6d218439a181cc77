"""What tests of quantizers share: a small real model to quantize, silence, what lies in a folder, and a process that dies."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest

from pyengine import checkpoint

TEXT = "Once upon a time there was a little girl who liked to play outside. One day she saw a big red ball. " * 40
STORIES = Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="the folder with test texts and models is not beside the repository")


def quiet(items, label):
    """A `progress` that shows nothing."""
    return items


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@contextmanager
def crash_at(monkeypatch, nth: int):
    """What is done within ends by KeyboardInterrupt before the nth file gets its name."""
    count, real = 0, checkpoint.os.replace

    def replace(a, b):
        nonlocal count
        count += 1
        if count == nth:
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            yield
