"""Make a GGUF of another type with llama.cpp's own quantizer: `llamacpp_quantize.py IN.gguf OUT.gguf q4_0|q4_k_m|q8_0`.

The output matrix follows llama.cpp's defaults, as `llama-quantize` would make it.
"""

from __future__ import annotations

import os
import sys

import llama_cpp as lib

TYPES = {"q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k_m": lib.LLAMA_FTYPE_MOSTLY_Q4_K_M, "q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0}


def main(source: str, out: str, kind: str) -> None:
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = TYPES[kind], True, os.cpu_count()
    partial = f"{out}.partial"  # so that a file under the final name is whole
    if code := lib.llama_model_quantize(source.encode(), partial.encode(), params):
        sys.exit(f"llama.cpp's quantizer ended with code {code}")
    os.replace(partial, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
