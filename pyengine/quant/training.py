"""Training the parameters of one block so that its quantized output meets the float one: the loop that the learned methods share.

AdamW without weight decay, a cosine from each group's rate down to a thousandth of the first group's. Every token's error is measured
against that token's own size: the first token of a text is hundreds of times as large as the others in most models, and in a plain mean
square it alone would be trained, while the norms that read the stream see every token at the same size. The loss is divided by its own
value, so that the gradient is that of its logarithm and one rate fits every depth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import write_file
from .calibration import fast_matmul
from .common import Block

FLOOR = 1e-3  # of the first group's rate
Forward = Callable[[Tensor], Tensor]


def train(
    groups: list[tuple[Iterable[nn.Parameter], float]],
    forward: Forward,
    inputs: Tensor,
    targets: Tensor,
    steps: int,
    batch: int,
    random: torch.Generator,
    before_step: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """Minimise `error(forward(x), target)` over the (parameters, rate) groups; returns the error of every step.

    inputs and targets are f32[samples, t, hidden]; each step takes `batch` samples, all samples before any comes again.
    `before_step(step)` is called first in each.
    """
    rates = [rate for _, rate in groups]
    optimizer = torch.optim.AdamW([{"params": list(p), "lr": rate} for p, rate in groups], weight_decay=0.0)
    floor, errors, order = rates[0] * FLOOR, [], torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        before_step(step)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = floor + (rate - floor) * (1 + math.cos(math.pi * step / steps)) / 2
        while len(order) < batch:
            order = torch.cat((order, torch.randperm(len(inputs), generator=random)))
        chosen, order = order[:batch], order[batch:]
        with fast_matmul():
            loss = error(forward(inputs[chosen]), targets[chosen])
        optimizer.zero_grad()
        (loss / loss.detach()).backward()
        optimizer.step()
        errors.append(float(loss.detach()))
    return errors


def error(y: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖y − target‖² / ‖target‖², f32."""
    return ((y.float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-30)).mean()


def relative_error(forward: Forward, inputs: Tensor, targets: Tensor) -> float:
    """The root of `error` over all the windows."""
    with torch.no_grad(), fast_matmul():
        return math.sqrt(float(error(forward(inputs), targets)))


def note(block: Block, **found: float) -> None:
    """Leave in the block's folder what `statistics` gathers."""
    write_file(block.folder / f"training-{block.index:05d}.json", (json.dumps(found).encode(),))


def statistics(folder: Path) -> dict[str, list[float]]:
    """Of each block what training has noted: its relative output error before and after, and what else the method counts."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("training-*.json"))]
    return {key: [round(f[key], 6) for f in found] for key in found[0]} if found else {}
