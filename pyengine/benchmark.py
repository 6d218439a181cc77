"""How fast a model runs: prefill and decode in tokens/s, and the bytes that decoding moves."""

from __future__ import annotations

import resource
import statistics
import sys
import time

import torch

from . import ops
from .cache import Batch
from .engine import CHUNK, Engine
from .layers import weight_layers


def weight_bytes(engine: Engine) -> int:
    """Bytes of weights that one decode step reads: every linear, and the head."""
    return sum(layer.nbytes for layer in weight_layers(engine.model))


def kernel_names(engine: Engine) -> list[str]:
    """The kernels that the model's linears run."""
    return sorted({layer.kernel_name() for layer in weight_layers(engine.model)})


def peak_rss_mib() -> float:
    """The most memory this process has held, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def measure(engine: Engine, prompt: int = 512, decode: int = 128, batch: int = 1, runs: int = 5) -> dict:
    """Medians over `runs` after one that is not counted. Tokens are random: their values do not matter for speed.

    Returns prefill_tok_s and decode_tok_s (over the whole batch), gb_per_s (weights and KV cache read while decoding), rss_mib, threads, kernels.
    """
    for name, value in {"prompt": prompt, "decode": decode, "batch": batch, "runs": runs}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if prompt + decode > engine.context:
        raise ValueError(f"prompt and decode are {prompt + decode} tokens together, the model's context holds {engine.context}")
    ids = torch.randint(engine.model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    cache = engine.model.cache(batch, prompt + decode)
    prefill, step = [], []
    for run in range(runs + 1):
        start = time.perf_counter()
        for slot in range(batch):
            for begin in range(0, prompt, CHUNK):
                part = ids[slot, begin : begin + CHUNK].tolist()
                positions = list(range(begin, begin + len(part)))
                engine.model(Batch.of(part, [slot] * len(part), positions, cache, [len(part) - 1]), cache)
        middle = time.perf_counter()
        for i in range(decode):
            engine.model(Batch.of([i % 7] * batch, list(range(batch)), [prompt + i] * batch, cache), cache)
        end = time.perf_counter()
        if run:
            prefill.append(middle - start)
            step.append((end - middle) / decode)
    seconds = statistics.median(step)
    kv_read = cache.nbytes / cache.length * (prompt + decode / 2)
    return {
        "prefill_tok_s": prompt * batch / statistics.median(prefill),
        "decode_tok_s": batch / seconds,
        "gb_per_s": (weight_bytes(engine) + kv_read) / seconds / 1e9,
        "rss_mib": peak_rss_mib(),
        "prompt": prompt,
        "decode": decode,
        "batch": batch,
        "kv_bits": cache.bits,
        "runs": runs,
        "threads": ops.threads(),
        "kernels": kernel_names(engine),
    }
