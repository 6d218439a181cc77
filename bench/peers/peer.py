"""What the scripts of all peers share. Only the standard library: each runs in a virtual environment of its own.

A script times one variant of one library on one model: it prefills `--prompt` tokens into an empty KV cache, then feeds `--decode` tokens one at
a time. Alone it prints one JSON line with the medians of `--runs` such repetitions. With `--serve` it says one line when it is ready, then does
one repetition for each line it reads and answers with its numbers: so compare.py lets libraries take turns without starting them anew.
What cannot run prints {"error": …} instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable


def tokens(count: int) -> list[int]:
    """Token ids that every vocabulary has. Their values hardly matter for speed, but one token repeated would be an unusual load."""
    return [(i * 7919) % 500 + 3 for i in range(count)]


class Run:
    """One repetition's clock: the peer calls `prefilled` between its two phases."""

    def __init__(self) -> None:
        self.start, self.middle = time.perf_counter(), 0.0

    def prefilled(self) -> None:
        self.middle = time.perf_counter()


def rss_mib() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(name: str, variants: list[str], load: Callable[[argparse.Namespace], tuple[Callable[[Run], None], dict]]) -> None:
    """`load(args)` makes ready and returns (repetition, facts to print beside the numbers)."""
    parser = argparse.ArgumentParser(description=f"Prefill and decode speed of {name}.")
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--model", required=True, help="the model in the form that this library reads")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5, help="repetitions, after one that is not counted")
    parser.add_argument("--serve", action="store_true", help="a repetition for each line on stdin")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to stdout too: they get stderr
    os.dup2(2, 1)

    def say(**line) -> None:
        print(json.dumps(line), file=answers)

    try:
        start = time.perf_counter()
        repeat, facts = load(args)
        facts = {"peer": name, "variant": args.variant, "threads": args.threads, "load_s": round(time.perf_counter() - start, 3), **facts}

        def once() -> dict:
            run = Run()
            repeat(run)
            end = time.perf_counter()
            return {"prefill_tok_s": args.prompt / (run.middle - run.start), "decode_tok_s": args.decode / (end - run.middle)}

        once()
        facts["rss_mib"] = round(rss_mib(), 1)
        if args.serve:
            say(ready=True, **facts)
            for _ in sys.stdin:
                say(**once())
        else:
            runs = [once() for _ in range(args.runs)]
            say(**facts, prompt=args.prompt, decode=args.decode, runs=args.runs, **{key: statistics.median(r[key] for r in runs) for key in runs[0]})
    except Exception as e:  # whatever a foreign library throws is the answer
        say(peer=name, variant=args.variant, error=" ".join(f"{type(e).__name__}: {e}".split())[:400])
        sys.exit(1)
