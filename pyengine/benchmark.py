"""How fast a model runs: prefill and decode in tokens/s, the bytes that decoding moves, its time outside kernels, and what the model holds in memory."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch

from . import ops
from .cache import Batch
from .engine import CHUNK, Engine
from .layers import weight_layers


def weight_bytes(engine: Engine) -> int:
    """Bytes of weights that one decode step reads: every linear, and the head."""
    return sum(layer.nbytes for layer in weight_layers(engine.model))


def kernel_names(engine: Engine) -> list[str]:
    """The kernels that the model's linears run, for one token or for a chunk of a prompt."""
    return sorted({layer.kernel_name(tokens) for layer in weight_layers(engine.model) for tokens in (1, CHUNK)})


def peak_rss_mib() -> float:
    """The most memory this process has held, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def resident_mib() -> float:
    """The memory this process holds now, MiB; where the system does not say, the most it has held."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return peak_rss_mib()


def bare_torch_mib() -> float:
    """What a process holds that has only imported torch, which is no model's doing."""
    code = f"import torch; from {__package__}.benchmark import resident_mib; print(resident_mib())"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def outside_kernels(step: Callable[[int], None], steps: int) -> float:
    """The share of `steps` calls of step(i) that is spent outside native calls: Python, torch, and what they wait for."""
    inside = 0.0

    def clocked(call: Callable) -> Callable:
        def run(*args, **kwargs) -> None:
            nonlocal inside
            start = time.perf_counter()
            call(*args, **kwargs)
            inside += time.perf_counter() - start

        return run

    # Every native call passes one of these two.
    with mock.patch.object(ops, "go", clocked(ops.go)), mock.patch.object(ops.Program, "run", clocked(ops.Program.run)):
        start = time.perf_counter()
        for i in range(steps):
            step(i)
        total = time.perf_counter() - start
    return 1 - inside / total


def kernel_shares(step: Callable[[int], None], steps: int) -> dict[str, float]:
    """The share of each kernel in the time of all of them, over `steps` calls of step(i), the largest first. Empty where no program is recorded."""
    seconds: dict[str, float] = {}

    def run(program: ops.Program) -> None:
        for kernel, time in program.time():
            seconds[kernel] = seconds.get(kernel, 0) + time

    with mock.patch.object(ops.Program, "run", run):
        for i in range(steps):
            step(i)
    return {kernel: s / sum(seconds.values()) for kernel, s in sorted(seconds.items(), key=lambda item: -item[1])}


def measure(engine: Engine, prompt: int = 512, decode: int = 128, batch: int = 1, runs: int = 5) -> dict:
    """Medians over `runs` after one that is not counted. Tokens are random: their values do not matter for speed.

    Returns prefill_tok_s and decode_tok_s (over the whole batch), gb_per_s (weights and KV cache read while decoding), outside_kernels (the
    share of decoding), prefill_kernels and decode_kernels (the share of each kernel in the time inside of them), rss_mib (the peak), memory in
    MiB as it is held in the end (resident, of which bare torch, weights and KV cache; beyond is the rest), threads, kernels.
    """
    for name, value in {"prompt": prompt, "decode": decode, "batch": batch, "runs": runs}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if prompt + decode > engine.context:
        raise ValueError(f"prompt and decode are {prompt + decode} tokens together, the model's context holds {engine.context}")
    ids = torch.randint(engine.model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    cache = engine.model.cache(batch, prompt + decode)
    prefill, step = [], []

    def decode_step(i: int) -> None:
        engine.model(Batch.of([i % 7] * batch, list(range(batch)), [prompt + i] * batch, cache), cache)

    def fill(_: int = 0) -> None:
        for slot in range(batch):
            for begin in range(0, prompt, CHUNK):
                part = ids[slot, begin : begin + CHUNK].tolist()
                positions = list(range(begin, begin + len(part)))
                engine.model(Batch.of(part, [slot] * len(part), positions, cache, [len(part) - 1]), cache)

    for run in range(runs + 1):
        start = time.perf_counter()
        fill()
        middle = time.perf_counter()
        for i in range(decode):
            decode_step(i)
        end = time.perf_counter()
        if run:
            prefill.append(middle - start)
            step.append((end - middle) / decode)
    seconds = statistics.median(step)
    kv_read = cache.nbytes / cache.length * (prompt + decode / 2)
    held = {"resident": resident_mib(), "torch": bare_torch_mib(), "weights": weight_bytes(engine) / 2**20, "kv": cache.nbytes / 2**20}
    held["beyond"] = held["resident"] - held["torch"] - held["weights"] - held["kv"]
    return {
        "prefill_tok_s": prompt * batch / statistics.median(prefill),
        "decode_tok_s": batch / seconds,
        "gb_per_s": (weight_bytes(engine) + kv_read) / seconds / 1e9,
        "outside_kernels": outside_kernels(decode_step, decode),
        "prefill_kernels": kernel_shares(fill, runs),
        "decode_kernels": kernel_shares(decode_step, decode),
        "rss_mib": peak_rss_mib(),
        "memory_mib": {name: round(mib, 1) for name, mib in held.items()},
        "prompt": prompt,
        "decode": decode,
        "batch": batch,
        "kv_bits": cache.bits,
        "runs": runs,
        "threads": ops.threads(),
        "kernels": kernel_names(engine),
    }
