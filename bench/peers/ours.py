"""PyEngine itself, through the same door as its peers. The model is a PyEngine checkpoint."""

from __future__ import annotations

from peer import Run, main, tokens

import pyengine
from pyengine import benchmark
from pyengine.cache import Batch
from pyengine.engine import CHUNK


def load(args):
    engine = pyengine.load(args.model, threads=args.threads)
    model = engine.model
    cache = model.cache(1, args.prompt + args.decode)
    prompt = tokens(args.prompt)

    def repeat(run: Run) -> None:
        for begin in range(0, args.prompt, CHUNK):
            part = prompt[begin : begin + CHUNK]
            model(Batch.of(part, [0] * len(part), list(range(begin, begin + len(part))), cache, [len(part) - 1]), cache)
        run.prefilled()
        for i, token in enumerate(tokens(args.decode)):
            model(Batch.of([token], [0], [args.prompt + i], cache), cache)

    return repeat, {"kernels": benchmark.kernel_names(engine), "weight_bytes": benchmark.weight_bytes(engine)}


if __name__ == "__main__":
    main("pyengine", ["checkpoint"], load)
