"""Make a Hugging Face directory of a GGUF with transformers' own reader: `hf_from_gguf.py IN.gguf OUT`. The other peers convert from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source: str, out: str) -> None:
    folder, file = os.path.split(source)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    # transformers takes a model that came from a GGUF for a quantized one, which it would not save.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = Path(out + ".partial")  # so that a directory under the final name is whole
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(partial)
    partial.rename(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
