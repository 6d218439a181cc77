"""What each part of FlatQuant is worth: `python bench/flatquant.py --text FILE --calib FILE [--steps 12 --act-bits 4 --kv-bits 4]`.

Every row quantizes the model with another recipe and measures its perplexity twice: in plain torch (quant/simulate.py), and by the kernels,
with the paired difference of the two and its standard error. Without steps nothing is trained: what counts then is where training starts.
The numbers are written to bench/results/flatquant-<model>-<date>.json as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from machine import commit, machine  # noqa: E402

from pyengine import demo  # noqa: E402
from pyengine.evaluate import score, summary  # noqa: E402
from pyengine.files import read_text  # noqa: E402
from pyengine.formats import open_checkpoint  # noqa: E402
from pyengine.loader import load  # noqa: E402
from pyengine.quant import flatquant  # noqa: E402
from pyengine.quant.simulate import Simulation  # noqa: E402
from pyengine.quant.transforms import random_orthogonal  # noqa: E402
from pyengine.quantizer import quantize  # noqa: E402
from pyengine.tokenizer import load_tokenizer  # noqa: E402

RESULTS = Path(__file__).parent / "results"
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


def measure(folder: str, windows: torch.Tensor) -> dict:
    """Perplexity of a checkpoint over windows i64[samples, t]: simulated, by the kernels, and how far the second is from the first."""
    simulated = Simulation(open_checkpoint(folder)).losses(windows).flatten()
    found = summary(score(load(folder), windows.tolist()), simulated)
    kept = {key: found[key] for key in ("perplexity", "nll_difference", "nll_difference_standard_error")}
    return {"simulated_perplexity": math.exp(simulated.double().mean())} | kept


def run(args: argparse.Namespace) -> None:
    source = Path(args.model) if args.model else demo.source()
    ids = load_tokenizer(open_checkpoint(source)).encode(read_text(args.text))[: args.windows * args.context]
    windows, start = torch.tensor(ids).view(args.windows, args.context), flatquant.RECIPE
    settings = {key: getattr(args, key) for key in ("steps", "act_bits", "kv_bits", "windows", "context")}
    file = RESULTS / f"flatquant-{source.stem}-{time.strftime('%Y-%m-%d')}.json"
    results = json.loads(file.read_text()) if file.exists() else {"model": source.stem, "machine": machine(), "rows": []}
    print(f"{source.name}, W4A{args.act_bits}KV{args.kv_bits}, {args.steps} steps a block\n")
    print("| recipe | simulated | by the kernels | Δ nll ± SE | CPU s |\n|---|---|---|---|---|")
    for name in args.only or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            began, flatquant.RECIPE = time.process_time(), replace(start, **ROWS[name])
            quantize(source, f"{folder}/model", "flatquant", calib=args.calib, steps=args.steps, act_bits=args.act_bits, kv_bits=args.kv_bits)
            made = time.process_time() - began
            row = {"recipe": name, **settings, "cpu_seconds": round(made), "commit": commit(), **measure(f"{folder}/model", windows)}
        same = {"recipe", *settings}
        results["rows"] = [r for r in results["rows"] if any(r[key] != row[key] for key in same)] + [row]
        file.write_text(json.dumps(results, indent=1) + "\n")
        error = row["nll_difference_standard_error"]  # none of a single piece
        apart = f"{row['nll_difference']:+.4f} ± " + ("–" if error is None else f"{error:.4f}")
        print(f"| {name} | {row['simulated_perplexity']:.2f} | {row['perplexity']:.2f} | {apart} | {made:.0f} |", flush=True)


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
    run(parser.parse_args())


if __name__ == "__main__":
    main()
