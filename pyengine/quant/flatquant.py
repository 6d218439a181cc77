"""FlatQuant (arXiv 2410.09426): learn an invertible change of basis for the input of every linear, so that activations and weights
become flat and both can be rounded to 4 bits.

    site      basis                                  at run time                  merged into
    attn_in   diag(c) · (left ⊗ right)               Kronecker product            c: input_layernorm; inverse: q, k, v
    o_in      Po ⊗ Pv                                Po mixes the heads (left)    Pv: rows of v; inverse: o
    mlp_in    diag(c) · (left ⊗ right)               Kronecker product            c: post_attention_layernorm; inverse: gate, up
    down_in   diag(c) · (left ⊗ right)               Kronecker product            c: rows of up; inverse: down
    keys      Pk after RoPE, with a 4-bit KV cache   q · Pk⁻ᵀ and k · Pk          –

Learned with them: how far below its largest entries each weight row, each site's tokens, and keys and values are clipped. Every block is
trained by itself on the float model's inputs (`training`), then merged in float64 and rounded. Transforms are rounded to the float16 that
is stored before their inverse is merged, so that the two stay inverse to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..qtensor import QTensor, fit_group
from . import fakequant, rounding
from .common import Block, Spec, require_finite, require_float16
from .merge import NORMS, observe, smoothing
from .training import note, relative_error, statistics, train
from .transforms import PARAMETRISATIONS, balanced_pair, flat_rotation, key, kron

__all__ = ["GROUP_SIZE", "STEPS", "complete", "quantize_block", "statistics"]
GROUP_SIZE = 0  # a scale a row: what integer kernels for activations want
STEPS = 32
SCALED = ("attn_in", "mlp_in", "down_in")  # sites with a scale for each channel
V, O, UP = "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"
START_LOGIT = {True: 1.75, False: 4.0}  # of a clip ratio at the start, by whether it is 4 bits or fewer: 0.85, and the paper's 0.98


@dataclass(frozen=True)
class Recipe:
    """What is learned and how. `batch` windows a step; `scale` and `clip` are the paper's PS and LCT."""

    rate: float = 1e-2
    clip_rate: float = 0.2
    batch: int = 4
    scale: bool = True
    clip: bool = True
    alpha: float = 0.6  # how much of an activation's range the scale's start moves into the weights
    start: Callable[[int, torch.Generator], Tensor] = flat_rotation
    parametrisation: str = "direct"


RECIPE = Recipe()


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults.

    What steps buy, SmolLM2-135M, W4A4 with a 4-bit KV cache, `--calib` WikiText-2 valid, perplexity by `simulate` on the first two windows
    of 2048 tokens of the test text (17.5 in float): 32.1 without any, 27.5 with 12 a block.
    """
    require_symmetric(spec)
    spec = replace(spec, outliers=0.0, score=None, scope=None, grid="range", samples=spec.samples or 32, seq_len=spec.seq_len or 128)
    return rounding.complete(spec, "rtn", spec.samples, spec.seq_len)


def require_symmetric(spec: Spec) -> None:
    """ValueError if the grid asked for is not the one whose clip ratios are learned."""
    if not spec.symmetric:
        raise ValueError(f"{spec.method} rounds weights symmetrically; asymmetric weights are not supported")


class FlatBlock(nn.Module):
    """The parameters of one block and what it computes with them: float weights in, transformed and fake-quantized weights out."""

    def __init__(self, block: Block, spec: Spec, recipe: Recipe, largest: dict[str, Tensor], random: torch.Generator):
        """`largest` f32[k] by site: the largest magnitude of each input channel."""
        super().__init__()
        self.block, self.spec, self.recipe = block, spec, recipe
        c, make = block.config, PARAMETRISATIONS[recipe.parametrisation]
        self.heads, self.head_dim = c.num_attention_heads, c.head_dim
        shapes = {"o_in.left": self.heads, "self_attn.value": self.head_dim}
        for site in SCALED:
            shapes[f"{site}.left"], shapes[f"{site}.right"] = balanced_pair(block.weights[f"{block.sites[site][0]}.weight"].shape[1])
        if spec.kv_bits == 4:
            shapes["self_attn.key"] = self.head_dim
        self.matrices = nn.ModuleDict({key(name): make(recipe.start(n, random)) for name, n in shapes.items()})
        smooth = {site: smoothing(block, site, largest[site], recipe.alpha).log() for site in SCALED if recipe.scale}
        self.scales = nn.ParameterDict({site: nn.Parameter(log) for site, log in smooth.items()})
        clipped = dict.fromkeys(block.sites, spec.act_bits) | dict.fromkeys(("key", "value"), spec.kv_bits)
        clipped = {name: bits for name, bits in clipped.items() if recipe.clip and (bits == 4 or bits == 8 and name in block.sites)}
        self.ratios = nn.ParameterDict({name: nn.Parameter(torch.full((2,), START_LOGIT[bits <= 4])) for name, bits in clipped.items()})
        self.row_ratios = nn.ParameterDict({key(name): nn.Parameter(row_logits(block, spec, name)) for name in block.linears if recipe.clip})

    def bases(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(P, P⁻ᵀ) f32 by name: `<site>.left`, `<site>.right`, `self_attn.value`, `self_attn.key`."""
        return {slot.replace("__", "."): matrix() for slot, matrix in self.matrices.items()}

    def merged(self, bases: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype, rounded: bool) -> dict[str, Tensor]:
        """Weights, biases and norms of the block in the new bases, in `dtype`; linears clipped, and fake-quantized if `rounded`."""
        old = {name: t.to(dtype) for name, t in self.block.weights.items()}
        exact = torch.promote_types(dtype, torch.float32)  # of norms and biases, which work on the float stream
        new = {name: t.to(exact) for name, t in self.block.weights.items() if not name.endswith("proj.weight")}
        scale = {site: log.to(dtype).exp() for site, log in self.scales.items()}
        for site, names in self.block.sites.items():
            left, right = f"{site}.left", f"{site}.right" if site != "o_in" else "self_attn.value"
            for name in names:
                w = old[f"{name}.weight"] / scale[site] if site in scale else old[f"{name}.weight"]
                w = kron(w, bases[left][1].to(dtype), bases[right][1].to(dtype))
                new[f"{name}.weight"] = self._rows(w, name, rounded and name != V)
            if site in scale and site in NORMS:
                new[f"{NORMS[site]}.weight"] = new[f"{NORMS[site]}.weight"] * self.scales[site].to(exact).exp()
        for name in (f"{V}.weight", f"{V}.bias"):
            if name in new:
                value, by_head = bases["self_attn.value"][0].to(new[name].dtype), new[name].reshape(-1, self.head_dim, old[name][0].numel())
                new[name] = (value.mT @ by_head).reshape(old[name].shape)
        if rounded:
            new[f"{V}.weight"] = self._rows(new[f"{V}.weight"], None, True)
        if "down_in" in scale:  # a row's factor goes into its scale and changes no code
            new[f"{UP}.weight"] = new[f"{UP}.weight"] * scale["down_in"].unsqueeze(1)
            if f"{UP}.bias" in new:
                new[f"{UP}.bias"] = new[f"{UP}.bias"] * self.scales["down_in"].to(exact).exp()
        return new

    def _rows(self, w: Tensor, name: str | None, rounded: bool) -> Tensor:
        """w[n, k] clipped to what was learned for the linear `name`, and rounded."""
        groups = w.unflatten(1, (-1, fit_group(self.spec.group_size, w.shape[1])))
        slot = key(name) if name else None
        ratio = self.row_ratios[slot].to(w.dtype).sigmoid() if slot in self.row_ratios else w.new_ones(2)
        if rounded:
            return fakequant.quantize_rows(groups, ratio.expand(*groups.shape[:2], 2), self.spec.bits).flatten(1)
        return (fakequant.clip_rows(groups, ratio) if slot in self.row_ratios else groups).flatten(1)

    def clip(self, name: str) -> Tensor:
        """f32[2]: the (upper, lower) ratio of a site, or of "key" or "value"."""
        return self.ratios[name].sigmoid() if name in self.ratios else torch.ones(2)

    def edit(self, bases: dict[str, tuple[Tensor, Tensor]], rounded: bool) -> Callable[[str, Tensor], Tensor]:
        """The `edit` of `block_forward`: transforms at the sites, after RoPE, and fake quantization if `rounded`."""

        def change(what: str, v: Tensor) -> Tensor:
            if what in ("query", "key", "value"):
                if what != "value" and "self_attn.key" in bases:
                    v = v @ bases["self_attn.key"][what == "query"]
                return fakequant.quantize_cached(v.float(), self.clip(what), self.spec.kv_bits) if rounded and what != "query" else v
            right = bases[f"{what}.right"][0] if what != "o_in" else None
            v = kron(v, bases[f"{what}.left"][0], right)
            return fakequant.quantize_tokens(v.float(), self.clip(what), self.spec.act_bits) if rounded and self.spec.act_bits < 16 else v

        return change

    def forward(self, x: Tensor, rounded: bool = True) -> Tensor:
        """x f32[b, t, hidden] through the transformed block, fake-quantized if `rounded`."""
        bases = self.bases()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        with torch.autocast("cpu", enabled=False):
            weights = self.merged(bases, dtype, rounded)
        return self.block.forward(weights, x, None, self.edit(bases, rounded))


def row_logits(block: Block, spec: Spec, name: str) -> Tensor:
    """f32[n, k/group, 2]: where the clip ratios of the rows of the linear `name` start, before the sigmoid."""
    n, k = block.weights[f"{name}.weight"].shape
    return torch.full((n, k // fit_group(spec.group_size, k), 2), START_LOGIT[spec.bits <= 4])


def merged_block(block: Block, weights: dict[str, Tensor], own: Callable[[str, Tensor], Tensor]) -> Block:
    """The block that a rounding gets: merged weights, and a forward that does `own` between them.

    Its hook sees what the weights multiply; its edit sees queries, keys and values as they come, before `own`.
    """

    def forward(weights: dict[str, Tensor], x: Tensor, hook: Callable | None = None, edit: Callable | None = None) -> Tensor:
        def change(what: str, v: Tensor) -> Tensor:
            if edit and what not in block.sites:
                v = edit(what, v)
            v = own(what, v)
            if hook and what in block.sites:
                hook(what, v)
            return v

        return block.forward(weights, x, None, change)

    return replace(block, weights=weights, forward=forward)


def quantize_block(block: Block, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, QTensor | Tensor]:
    """Train one block's transforms and clips on its float inputs f32[s, t, hidden], merge them and round."""
    recipe, x = RECIPE, inputs()
    random = torch.Generator().manual_seed(spec.seed + block.index)
    targets, largest = observe(block, x)
    flat, few = FlatBlock(block, spec, recipe, largest, random), slice(0, recipe.batch)
    before = relative_error(flat, x[few], targets[few])
    bases, clips = [*flat.matrices.parameters(), *flat.scales.parameters()], [*flat.ratios.parameters(), *flat.row_ratios.parameters()]
    train([(bases, recipe.rate), (clips, recipe.clip_rate)], flat, x, targets, spec.steps, recipe.batch, random)
    note(block, relative_error_before=before, relative_error_after=relative_error(flat, x[few], targets[few]))
    return stored(flat, inputs)


def stored(flat: FlatBlock, inputs: Callable[[], Tensor]) -> dict[str, QTensor | Tensor]:
    """What the checkpoint holds of a trained block: transforms, clips, norms and the rounded weights, merged in float64."""
    block, spec, out = flat.block, flat.spec, {}
    with torch.no_grad():
        bases = {name: _exact(p.half() if name != "self_attn.value" else p, block.prefix + name) for name, (p, _) in flat.bases().items()}
        weights = {name: w.float() for name, w in flat.merged(bases, torch.float64, False).items()}
        for name, (p, inverse) in bases.items():
            if name == "self_attn.key":
                require_float16(inverse, f"{block.prefix}self_attn.q_transform: a value")
                out |= {"self_attn.k_transform": p.half(), "self_attn.q_transform": inverse.half()}
            elif name != "self_attn.value":
                out[name] = p.half()
        if spec.act_bits < 16:
            out |= {f"{site}.clip": flat.clip(site) for site in block.sites}
        if spec.kv_bits == 4:
            out |= {"self_attn.k_clip": flat.clip("key"), "self_attn.v_clip": flat.clip("value")}
    for name in NORMS.values():
        out[f"{name}.weight"] = weights[f"{name}.weight"]
        require_finite(weights[f"{name}.weight"], f"{block.prefix}{name}")
    own = flat.edit({name: (p.float(), inverse.float()) for name, (p, inverse) in bases.items()}, True)

    return out | rounding.round_block(merged_block(block, weights, own), inputs, spec)


def _exact(p: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(P, P⁻ᵀ) f64 of a matrix as it is stored."""
    require_finite(p, name)
    return p.double(), torch.linalg.inv(p.double()).mT
