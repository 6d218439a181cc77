"""Scaling the inputs of a site without a trace at run time: x / s meets W · diag(s), and what makes x takes the division.

    attn_in, mlp_in   the weight of the norm before
    o_in              the rows (and bias) of v_proj. Query heads that share a key-value head get their values from the same rows, so
                      they share their scales too
    down_in           the rows of up_proj, which multiply what the gate lets through

Merged in float64. Rounding to nearest with a scale a row or a group does not notice that rows are scaled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .common import Block

NORMS = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}  # what makes a site's input
LINEARS = {"o_in": "self_attn.v_proj", "down_in": "mlp.up_proj"}


def smoothing(block: Block, site: str, largest: Tensor, alpha: float) -> Tensor:
    """c f32[k] = wmax^(1−α) / xmax^α, which makes both x·c and W/c flatter; `largest` is xmax f32[k], wmax is over all that read the site."""
    w = torch.cat([block.weights[f"{name}.weight"] for name in block.sites[site]]).abs().amax(0)
    return (w.clamp(min=1e-5).pow(1 - alpha) / largest.clamp(min=1e-5).pow(alpha)).clamp(min=1e-5)


def shared(site: str, statistic: Tensor, config) -> Tensor:
    """f32[k]: the statistic of each input, averaged over the inputs that must share a scale."""
    if site != "o_in":
        return statistic
    heads = statistic.view(config.num_key_value_heads, -1, config.head_dim)
    return heads.mean(1, keepdim=True).expand_as(heads).flatten()


def scale_inputs(weights: dict[str, Tensor], site: str, names: tuple[str, ...], s: Tensor, config) -> None:
    """Multiply the columns of a site's linears in `weights` by s f32[k], and divide what makes their input; o_in: s as `shared` gives it."""
    s = s.double()
    for name in names:
        weights[f"{name}.weight"] = (weights[f"{name}.weight"] * s).float()
    if site in NORMS:
        key = f"{NORMS[site]}.weight"
        weights[key] = (weights[key] / s).float()
        return
    rows = s.view(config.num_key_value_heads, -1, config.head_dim)[:, 0].flatten() if site == "o_in" else s
    for key, divisor in ((f"{LINEARS[site]}.weight", rows[:, None]), (f"{LINEARS[site]}.bias", rows)):
        if key in weights:
            weights[key] = (weights[key] / divisor).float()


def changed_norms(block: Block, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The norms that merging has changed, by their name inside the block, as f32: what they hold is no longer a float16 number."""
    return {key: w for name in NORMS.values() if (w := weights[key := f"{name}.weight"]) is not block.weights[key]}


def observe(block: Block, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(the float block's outputs f32[s, t, hidden], the largest magnitude of each input channel f32[k] by site)."""
    largest: dict[str, Tensor] = {}

    def see(site: str, x: Tensor) -> None:
        most = x.abs().amax((0, 1))
        largest[site] = torch.maximum(largest.get(site, most), most)

    with torch.no_grad():
        return torch.cat([block.forward(block.weights, x, see) for x in inputs.split(4)]), largest


def visit_inputs(block: Block, inputs: Tensor, see: Callable[[str, Tensor], None]) -> None:
    """Call see(site, x[1, t, k]) for every site and each sample of inputs[s, t, hidden], in the float block."""
    with torch.no_grad():
        for x in inputs:
            block.forward(block.weights, x.unsqueeze(0), see)
