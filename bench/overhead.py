"""What a call of `Linear` costs beside its kernel: `python bench/overhead.py`.

Prints microseconds of processor time a call, the median of many short runs taken in turn, for a matrix so small that its kernel takes next
to nothing: the native call alone, the module, the registered op, and torch's own Linear.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from pyengine import _C, memory
from pyengine.linear import Linear
from pyengine.torch_ops import arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=50, help="in a run")
    parser.add_argument("--runs", type=int, default=401)
    args = parser.parse_args()
    torch.set_num_threads(1)
    _C.set_threads(1)
    plain = nn.Linear(32, 32, bias=False)
    layer, x, y = Linear.from_float(plain, group_size=32, outliers=0), torch.randn(1, 32), torch.empty(1, 32)
    op, packed, call = _C.QLinear(layer._op), arguments(layer), torch.ops.pyengine.linear
    op.m, op.x, op.x_stride, op.y, op.y_stride = 1, x.data_ptr(), 32, y.data_ptr(), 32
    room = memory.workspace(op)
    ways = {
        "native call": op.run,
        "torch.empty": lambda: x.new_empty(1, 32),
        "Linear, eager": lambda: layer(x),
        "pyengine::linear": lambda: call(x, *packed),
        "pyengine::linear.out": lambda: call.out(x, *packed, out=y),
        "torch.nn.Linear": lambda: plain(x),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(args.runs):
            for name, way in ways.items():
                start = time.thread_time()
                for _ in range(args.calls):
                    way()
                times[name].append((time.thread_time() - start) / args.calls * 1e6)
    del room
    base = statistics.median(times["native call"])
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"{name:22} {median:6.2f} us   {median - base:+6.2f} us over the native call")


if __name__ == "__main__":
    main()
