"""AffineQuant (arXiv 2403.12544): learn scales for channels and a matrix for each value head, all merged into weights and norms.

    attn_in, mlp_in   diag(c)                    c: the norm before; inverse: q, k, v and gate, up
    values            A of each key-value head   rows of v; inverse: columns of o
    keys              a scale for each pair that RoPE turns together, with a quantized KV cache; rows of k, inverse: rows of q

Nothing is left to do at run time. A stays invertible because it stays near a diagonal one: a gradual mask lets in its off-diagonals band
by band, each damped by `damping`. The paper's dense matrices behind the norms are left out, as they would run in float for every token,
and so are its shifts; a scale that differs within a pair would not commute with RoPE. Weight ranges are clipped by learned ratios. Blocks
are trained on what the quantized blocks before them make, toward what the float model makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..qtensor import QTensor, fit_group
from . import fakequant, rounding
from .common import Block, Spec, require_finite
from .flatquant import O, V, merged_block, row_logits
from .merge import NORMS, observe, smoothing
from .training import note, relative_error, statistics, train
from .transforms import key

__all__ = ["complete", "quantize_block", "statistics"]
STEPS = 32
Q, K = "self_attn.q_proj", "self_attn.k_proj"
ALPHA = 0.5
RATE, CLIP_RATE, BATCH = 1e-2, 0.1, 4


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults."""
    spec = replace(spec, outliers=0.0, score=None, scope=None, grid="range", samples=spec.samples or 32, seq_len=spec.seq_len or 128)
    return rounding.complete(spec, "rtn", spec.samples, spec.seq_len)


class BandedMatrices(nn.Module):
    """A f32[count, d, d] times its mask: 1 on the diagonal, `damping` where |i − j| < band, 0 beyond; band 1 is diagonal."""

    def __init__(self, count: int, d: int, damping: float):
        super().__init__()
        self.matrix, self.damping, self.band = nn.Parameter(torch.eye(d).repeat(count, 1, 1)), damping, 1

    def forward(self) -> tuple[Tensor, Tensor]:
        """(A, A⁻ᵀ), each f32[count, d, d]."""
        i = torch.arange(self.matrix.shape[1])
        apart = (i[:, None] - i[None, :]).abs()
        a = self.matrix * ((apart > 0) * (apart < self.band) * self.damping + (apart == 0))
        return a, torch.linalg.inv(a.double()).mT.float()

    def widen(self, step: int, steps: int) -> None:
        """Let in as many bands as are due at this step: none at first, all of them at the last."""
        self.band = 1 + (self.matrix.shape[1] - 1) * step // max(steps - 1, 1)


class AffineBlock(nn.Module):
    """The parameters of one block; calling it gives the block's fake-quantized output."""

    def __init__(self, block: Block, spec: Spec, largest: dict[str, Tensor]):
        """`largest` f32[k] by site: the largest magnitude of each input channel."""
        super().__init__()
        self.block, self.spec, c = block, spec, block.config
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.scales = nn.ParameterDict({site: nn.Parameter(smoothing(block, site, largest[site], ALPHA).log()) for site in NORMS})
        self.value = BandedMatrices(self.kv_heads, self.head_dim, 0.1 if spec.act_bits < 16 else 0.01)
        self.pair_scale = nn.Parameter(torch.zeros(self.kv_heads, self.head_dim // 2))
        self.row_ratios = nn.ParameterDict({key(name): nn.Parameter(row_logits(block, spec, name)) for name in block.linears})

    def merged(self, dtype: torch.dtype, rounded: bool) -> dict[str, Tensor]:
        """Weights, biases and norms in the new bases, in `dtype`; linears clipped, and fake-quantized if `rounded`."""
        exact = torch.promote_types(dtype, torch.float32)  # of norms and biases, which work on the float stream
        new = {name: t.to(dtype if name.endswith("proj.weight") else exact) for name, t in self.block.weights.items()}
        for site, norm in NORMS.items():
            new[f"{norm}.weight"] = new[f"{norm}.weight"] * self.scales[site].to(exact).exp()
            for name in self.block.sites[site]:
                new[f"{name}.weight"] = new[f"{name}.weight"] / self.scales[site].to(dtype).exp()
        self._turn_heads(new)
        for name in self.block.linears:
            new[f"{name}.weight"] = self._rows(new[f"{name}.weight"], name, rounded)
        return new

    def _turn_heads(self, new: dict[str, Tensor]) -> None:
        """Put the values' matrices and the keys' scales into q, k, v and o."""
        shared, d = self.heads // self.kv_heads, self.head_dim
        value, inverse = self.value()
        pair = self.pair_scale.repeat(1, 2)  # channels i and i + d/2 turn together
        for name, head_scale in ((K, pair.flatten()), (Q, -pair.repeat_interleave(shared, 0).flatten())):
            for part in {f"{name}.weight", f"{name}.bias"} & new.keys():
                by = head_scale.to(new[part].dtype).exp()
                new[part] = new[part] * (by.unsqueeze(1) if new[part].dim() == 2 else by)
        for part in {f"{V}.weight", f"{V}.bias"} & new.keys():
            rows = new[part].reshape(self.kv_heads, d, -1)
            new[part] = (value.to(rows.dtype).mT @ rows).reshape(new[part].shape)
        w = new[f"{O}.weight"]
        by_head = w.view(len(w), self.kv_heads, shared, d).permute(1, 2, 0, 3)
        new[f"{O}.weight"] = (by_head @ inverse.to(w.dtype).unsqueeze(1)).permute(2, 0, 1, 3).reshape(w.shape)

    def _rows(self, w: Tensor, name: str, rounded: bool) -> Tensor:
        groups, ratio = w.unflatten(1, (-1, fit_group(self.spec.group_size, w.shape[1]))), self.row_ratios[key(name)].to(w.dtype).sigmoid()
        if not rounded:
            return fakequant.clip_rows(groups, ratio).flatten(1)
        quantizer = fakequant.quantize_rows if self.spec.symmetric else fakequant.quantize_asymmetric
        return quantizer(groups, ratio, self.spec.bits).flatten(1)

    def edit(self, what: str, v: Tensor) -> Tensor:
        """The `edit` of `block_forward`: activations, keys and values as the runtime rounds them."""
        whole = torch.ones(2)
        if what in self.block.sites:
            return fakequant.quantize_tokens(v.float(), whole, self.spec.act_bits) if self.spec.act_bits < 16 else v
        return v if what == "query" else fakequant.quantize_cached(v.float(), whole, self.spec.kv_bits)

    def forward(self, x: Tensor) -> Tensor:
        """x f32[b, t, hidden] through the block, everything fake-quantized."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        with torch.autocast("cpu", enabled=False):
            weights = self.merged(dtype, True)
        return self.block.forward(weights, x, None, self.edit)


def quantize_block(block: Block, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, QTensor | Tensor]:
    """Train one block, merge and round; `inputs()` f32[s, t, hidden] are the float model's, and give the targets."""
    targets, largest = observe(block, inputs())
    affine, x = AffineBlock(block, spec, largest), block.quantized_inputs()
    before = relative_error(affine, x[:BATCH], targets[:BATCH])
    bases = [*affine.scales.parameters(), *affine.value.parameters()] + ([affine.pair_scale] if spec.kv_bits < 16 else [])
    groups = [(bases, RATE), (affine.row_ratios.parameters(), CLIP_RATE)]
    random = torch.Generator().manual_seed(spec.seed + block.index)
    train(groups, affine, x, targets, spec.steps, BATCH, random, lambda step: affine.value.widen(step, spec.steps))
    note(block, relative_error_before=before, relative_error_after=relative_error(affine, x[:BATCH], targets[:BATCH]))
    return stored(affine, inputs)


def stored(affine: AffineBlock, inputs: Callable[[], Tensor]) -> dict[str, QTensor | Tensor]:
    """What the checkpoint holds of a trained block: norms and the rounded weights, merged in float64."""
    block = affine.block
    with torch.no_grad():
        weights = {name: w.float() for name, w in affine.merged(torch.float64, False).items()}
    out = {f"{name}.weight": weights[f"{name}.weight"] for name in NORMS.values()}
    for name, t in out.items():
        require_finite(t, block.prefix + name)
    return out | rounding.round_block(merged_block(block, weights, affine.edit), inputs, affine.spec)
