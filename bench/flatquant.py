"""What each part of FlatQuant is worth: `python bench/flatquant.py --text FILE --calib FILE [--steps 0 --act-bits 4 --kv-bits 4]`.

Every row quantizes the model with another recipe and measures its perplexity in plain torch. Without steps nothing is trained: what counts
then is where training starts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from pyengine import demo
from pyengine.files import read_text
from pyengine.formats import open_checkpoint
from pyengine.quant import flatquant
from pyengine.quant.simulate import simulated_perplexity
from pyengine.quant.transforms import random_orthogonal
from pyengine.quantizer import quantize
from pyengine.tokenizer import load_tokenizer

BARE = {"scale": False, "clip": False}
ROWS = {
    "random rotations": BARE | {"start": random_orthogonal},
    "Hadamard matrices (LT)": BARE,
    "LT, scales (PS) from alpha 0.3": {"clip": False, "alpha": 0.3},
    "LT, PS": {"clip": False},
    "LT, clips (LCT)": {"scale": False},
    "LT, PS, LCT": {},
    "LT, PS, LCT by Cayley maps": {"parametrisation": "cayley"},
    "random rotations, alpha 0.3, the paper's rates": {"start": random_orthogonal, "alpha": 0.3, "rate": 5e-3, "clip_rate": 5e-2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="float model (default: the demo model)")
    parser.add_argument("--text", required=True, help="UTF-8 text to measure on")
    parser.add_argument("--calib", required=True, help="UTF-8 text to calibrate on, another one than --text")
    parser.add_argument("--windows", type=int, default=2, help="of the text (default 2)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window (default 2048)")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), help="rows to run")
    for name, default in (("steps", 0), ("act-bits", 4), ("kv-bits", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    source = Path(args.model) if args.model else demo.source()
    ids = load_tokenizer(open_checkpoint(source)).encode(read_text(args.text))[: args.windows * args.context]
    windows, start = torch.tensor(ids).view(args.windows, args.context), flatquant.RECIPE
    print(f"{source.name}, W4A{args.act_bits}KV{args.kv_bits}, {args.steps} steps a block\n\n| recipe | perplexity | CPU seconds |\n|---|---|---|")
    for name in args.only or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            began, flatquant.RECIPE = time.process_time(), replace(start, **ROWS[name])
            quantize(source, f"{folder}/model", "flatquant", calib=args.calib, steps=args.steps, act_bits=args.act_bits, kv_bits=args.kv_bits)
            seconds = time.process_time() - began
            print(f"| {name} | {simulated_perplexity(f'{folder}/model', windows):.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
