"""Where and from what a number came: the machine and the commit that stand beside it in bench/results/."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def machine() -> dict:
    info = Path("/proc/cpuinfo").read_text()
    found = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in info.splitlines() if ":" in line}
    notable = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return {"cpu": found.get("model name", ""), "cores": os.cpu_count(), "features": [f for f in notable if f in found.get("flags", "").split()]}


def commit() -> str:
    """The commit that is checked out, "-dirty" where files beside the results differ from it."""
    changed = _git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE).stdout.strip()
