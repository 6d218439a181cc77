"""Other INT4 linears on a GPU, in the layers of Llama 3 8B: torch's _weight_int4pack_mm (bf16), and Marlin of a vLLM extension library where the
environment variable VLLM_LIBRARY names one. Groups of 128, no outliers: neither has any.

python bench/peers/gpu.py --json OUT     times as qbench takes them: CUDA graphs of many calls, weights that come from memory, medians
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # n, k
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096)
GROUP = 128


def timed(calls: list[Callable[[], object]]) -> float:
    """The median time of a call in microseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeat = max(1, 20 // len(calls))
    with torch.cuda.graph(graph):
        for call in calls * repeat:
            call()
    times = []
    for i in range(-3, 21):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 0:
            times.append(begin.elapsed_time(end) * 1e3 / (len(calls) * repeat))
    return sorted(times)[len(times) // 2]


def tinygemm(m: int, n: int, k: int, copies: int) -> list[Callable[[], object]]:
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    calls = []
    for _ in range(copies):
        packed = torch._convert_weight_to_int4pack(torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"), 8)
        scales = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
        calls.append(lambda packed=packed, scales=scales: torch._weight_int4pack_mm(x, packed, GROUP, scales))
    return calls


def marlin(m: int, n: int, k: int, copies: int) -> list[Callable[[], object]]:
    """Its arguments by their names in the library's own schema, which differs between versions; random codes need no repacking."""
    op = torch.ops._C.marlin_gemm.default
    # vLLM's number for uint4 with a bias of 8: mantissa bits from bit 8 on, bias from 17, IEEE NaN from 50.
    uint4b8 = 4 << 8 | 8 << 17 | 1 << 50
    given = {
        "a": torch.randn(m, k, dtype=torch.float16, device="cuda"), "b_q_type": uint4b8, "b_q_type_id": uint4b8, "b_type_id": uint4b8,
        "workspace": torch.zeros(1024, dtype=torch.int32, device="cuda"), "size_m": m, "size_n": n, "size_k": k, "is_k_full": True,
        "use_atomic_add": False, "use_fp32_reduce": True, "is_zp_float": False, "has_zp": False,
    }  # fmt: skip
    calls = []
    for _ in range(copies):
        given["b_q_weight"] = torch.randint(-(2**31), 2**31 - 1, (k // 16, n * 2), dtype=torch.int32, device="cuda")
        given["b_scales"] = torch.rand(k // GROUP, n, dtype=torch.float16, device="cuda")
        arguments = {}
        for argument in op._schema.arguments:
            if argument.name in given:
                arguments[argument.name] = given[argument.name]
            elif "Optional" in str(argument.type):
                arguments[argument.name] = None
            elif not argument.has_default_value():
                raise RuntimeError(f"marlin_gemm of this library wants {argument.name}, which is not known here")
        calls.append(lambda arguments=arguments: op(**arguments))
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    out = parser.parse_args().json
    if not torch.cuda.is_available():
        sys.exit("bench/peers/gpu.py: torch sees no GPU")
    cold = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    peers: dict[str, Callable] = {"torch int4": tinygemm}
    skipped = {}
    if library := os.environ.get("VLLM_LIBRARY"):
        try:
            torch.ops.load_library(library)
            peers["vLLM marlin"] = marlin
        except (OSError, RuntimeError) as e:
            skipped["vLLM marlin"] = str(e).splitlines()[0]
    rows = []
    for m in TOKENS:
        for layer, (n, k) in LAYERS.items():
            for name, make in list(peers.items()):
                try:
                    us = timed(make(m, n, k, max(1, -(-cold // (n * k // 2)))))
                except (RuntimeError, AttributeError, TypeError, NotImplementedError) as e:
                    skipped[name] = f"{layer}, {m} tokens: {str(e).splitlines()[0]}"
                    del peers[name]
                    continue
                rows.append({"peer": name, "layer": layer, "m": m, "n": n, "k": k, "bits": 4, "group": GROUP, "us": us})
        partial = out.with_suffix(".partial")  # what is done stays if the time runs out
        partial.write_text(json.dumps({"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "rows": rows, "skipped": skipped}))
        partial.replace(out)


if __name__ == "__main__":
    main()
