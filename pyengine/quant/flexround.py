"""FlexRound (arXiv 2306.00317): learn which way each weight is rounded, by dividing it before.

    w' = s1 · (clamp(round(w / (s1 · S2 · s3)) + zero) - zero)

with a step s1 for each group, a divisor S2 for each weight and s3 for each output, all learned so that the block's output on the inputs
that the quantized blocks before it make meets the float model's. A divisor moves a weight in proportion to its size: large weights may move
several steps. S2 and s3 are gone afterwards: the file holds codes and steps as rounding to nearest leaves them, which is also where the
training begins, bit for bit. As a rounding it takes the masks of other methods: `--method gwq --rounding flexround`.

All divisors are exponentials, so that they stay positive, and steps are rounded to float16 while they are learned, so that what was
trained is what is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..qtensor import QTensor, fit_group
from . import rounding, training
from .common import Block, Spec, assemble, fit_grid, require_finite, round_codes
from .merge import observe
from .training import statistics

__all__ = ["MIXED_BITS", "STEPS", "complete", "quantize_block", "round_block", "statistics"]
MIXED_BITS = True
STEPS = 32
BATCH = 4  # windows a step
RATE = 3e-3
MOST = 1.0  # |log S2|: a weight is divided by 0.37 to 2.7


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults; ValueError if another rounding is asked for."""
    rounding.require_own(spec, "flexround")
    if spec.grid not in (None, "range"):
        raise ValueError(f"grid is {spec.grid!r}, but flexround learns its grid from where rounding to nearest begins")
    spec = replace(spec, samples=spec.samples or 32, seq_len=spec.seq_len or 256)
    return replace(spec, outliers=0.0, score=None, scope=None, rounding="flexround", grid="range")


class Divided(nn.Module):
    """One matrix w f32[n, k] on a grid that is learned with its divisors; where mask[n, k] is true it stays what it is."""

    def __init__(self, w: Tensor, spec: Spec, mask: Tensor | None, rank: int, random: torch.Generator):
        """rank 0 learns S2 weight by weight; else log S2 = left · right + column, of that rank."""
        super().__init__()
        (n, k), self.spec, self.mask = w.shape, spec, mask
        self.w = w if mask is None else torch.where(mask, w.half().float(), w)  # what is kept is stored so
        self.first, self.zero = fit_grid(w, spec.bits, fit_group(spec.group_size, k), spec.symmetric, mask)
        self.log_step, self.row = nn.Parameter(torch.zeros(self.first.shape)), nn.Parameter(torch.zeros(n, 1))
        self.rank = rank
        if rank:
            self.left, self.column = nn.Parameter(torch.zeros(n, rank)), nn.Parameter(torch.zeros(1, k))
            self.right = nn.Parameter(torch.randn(rank, k, generator=random) / k**0.5)
        else:
            self.log_divisor = nn.Parameter(torch.zeros(n, k))

    def step(self) -> Tensor:
        """s1 f32[n, groups], rounded to the type that it is stored in."""
        s = self.first.float() * self.log_step.exp()
        return s + (s.to(self.first.dtype).float() - s).detach()

    def codes(self, step: Tensor) -> Tensor:
        """f32[n, groups, group]: codes less their zero. The rounding passes gradients through, the limits do not."""
        log = self.left @ self.right + self.column if self.rank else self.log_divisor
        divisor = (log.clamp(-MOST, MOST) + self.row).exp().unflatten(1, (step.shape[1], -1))
        v = self.w.unflatten(1, (step.shape[1], -1)) / (step.unsqueeze(2) * divisor)
        v = v + (torch.round(v) - v).detach()
        bits = self.spec.bits
        if self.zero is None:
            return v.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        zero = self.zero.float().unsqueeze(2)
        return (v + zero).clamp(0, 2**bits - 1) - zero

    def forward(self) -> Tensor:
        """f32[n, k]: the weights that will be stored."""
        step = self.step()
        w = (self.codes(step) * step.unsqueeze(2)).flatten(1)
        return w if self.mask is None else torch.where(self.mask, self.w, w)

    @torch.no_grad()
    def stored(self, bias: Tensor | None, name: str) -> QTensor:
        step, spec = self.step(), self.spec
        codes = self.codes(step) + (2 ** (spec.container - 1) if self.zero is None else self.zero.float().unsqueeze(2))
        return assemble(self.w, codes.flatten(1).to(torch.uint8), step.to(self.first.dtype), self.zero, spec, self.mask, bias, name)

    @torch.no_grad()
    def moved(self) -> Tensor:
        """f32[n, k]: how many steps each code is away from plain rounding."""
        plain = round_codes(self.w, self.first, self.zero, self.spec.bits, self.spec.container).float()
        zero = 2 ** (self.spec.container - 1) if self.zero is None else self.zero.float().repeat_interleave(self.w.shape[1] // self.zero.shape[1], 1)
        return (self.codes(self.step()).flatten(1) - (plain - zero)).abs()


def quantize_block(block: Block, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, QTensor]:
    """The quantized linears of one block by name. `inputs()` are its float inputs f32[s, t, hidden]."""
    return round_block(block, inputs, spec, {})


def round_block(block: Block, inputs: Callable[[], Tensor], spec: Spec, masks: dict[str, Tensor], rank: int = 0) -> dict[str, QTensor]:
    """As `quantize_block`, with masks bool[n, k] by name of what stays float16."""
    random = torch.Generator().manual_seed(spec.seed * 100003 + block.index)
    matrices = {}
    for name in block.linears:
        w = block.weights[f"{name}.weight"]
        require_finite(w, block.prefix + name)
        matrices[name] = Divided(w, spec.at(block.prefix + name), masks.get(name), rank, random)
    x, (targets, _) = block.quantized_inputs(), observe(block, inputs())

    def forward(x: Tensor) -> Tensor:
        return block.forward(block.weights | {f"{name}.weight": m() for name, m in matrices.items()}, x)

    before = training.relative_error(forward, x, targets)
    parameters = [p for m in matrices.values() for p in m.parameters()]
    steps = STEPS if spec.steps is None else spec.steps
    training.train([(parameters, RATE)], forward, x, targets, steps, min(BATCH, len(x)), random)
    after, moved = training.relative_error(forward, x, targets), torch.cat([m.moved().flatten() for m in matrices.values()])
    shares = {name: float((moved >= least).double().mean()) for name, least in (("moved", 1), ("moved_far", 2))}  # by a step, by more
    training.note(block, relative_error_before=before, relative_error_after=after, **shares)
    return {name: m.stored(block.weights.get(f"{name}.bias"), block.prefix + name) for name, m in matrices.items()}
