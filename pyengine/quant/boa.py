"""BoA (arXiv 2406.13474): GPTQ that knows what attention does with queries, keys and values.

GPTQ treats the rows of a matrix alike and each by itself. But an error in a query only shows in its products with the keys, and so a
head's rows have a Hessian of their own; that of a matrix of a head is H_row (x) H_col:

    q_proj   H_col = sum x x^T           H_row = mean over positions m of R_m^T (sum k k^T) R_m, k the keys of its head after RoPE
    k_proj   H_col = sum x x^T           H_row = the same with the queries of all heads that read the key head
    v_proj   H_col = sum a a^T, a = rows of (attention x inputs) of the heads that read the value head; H_row = 1
    others   as in `gptq`

R_m is RoPE at position m. Rows of a head are rounded one after another, those of different heads together, and each passes its error on
to the rows of its head that are still to come, as columns do: with U the upper Cholesky factor of H_row^-1,

    w[i] -= (w[r] - q[r]) * U[r, i] / U[r, r]     for i > r

Token weights, damping, order and grids are those of `gptq`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..qtensor import QTensor
from . import gptq, rounding
from .calibration import chunks
from .common import Block, Spec, assemble, require_finite
from .gptq import Factor

MIXED_BITS = True
QUERY, KEY, VALUE = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults; ValueError if another rounding is asked for."""
    return rounding.alone(spec, "boa", gptq.SAMPLES, gptq.SEQ_LEN)


quantize_block = rounding.round_block  # of a block that nothing was done to before


@dataclass
class Heads:
    """Statistics of a matrix whose rows belong to heads."""

    columns: list[Factor]  # of all heads, or of each
    rows: Tensor | None  # f32[heads, d, d]: Cholesky factor of the inverse of the damped H_row, upper triangle; None: rows are independent
    heads: int


def collect(block: Block, weights: dict[str, Tensor], site: str, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, Factor | Heads]:
    """Statistics of each linear of a site."""
    found = gptq.collect(block, weights, site, inputs, spec)
    if QUERY not in block.sites[site]:
        return found
    query, key = 0.0, 0.0
    for q, k in rounding.query_key(block, weights, block.quantized_inputs()):
        key = key + (k.transpose(2, 3) @ k).double().sum(0)
        grouped = q.unflatten(1, (k.shape[1], -1))
        query = query + (grouped.transpose(3, 4) @ grouped).double().sum((0, 2))
    shared = q.shape[1] // k.shape[1]
    turned = [unturned(h, *(t[: q.shape[2]] for t in block.rope)) for h in (key.repeat_interleave(shared, 0), query)]
    mixed = value_grams(block, weights, site)
    return {
        QUERY: Heads([found[QUERY]], torch.stack([row_factor(h) for h in turned[0]]), q.shape[1]),
        KEY: Heads([found[KEY]], torch.stack([row_factor(h) for h in turned[1]]), k.shape[1]),
        VALUE: Heads([gptq.factorise(h) for h in mixed], None, k.shape[1]),
    }


def unturned(h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """f64[heads, d, d]: the mean over positions of R_m^T h R_m, for symmetric h f64[heads, d, d] and cos, sin f32[t, d/2].

    R_m turns each pair (i, i + d/2) by its own angle, so that only means of products of two angles' cosines and sines enter.
    """
    half = h.shape[1] // 2
    cc, cs, sc, ss = (x.double().T @ y.double() / len(x) for x in (cos, sin) for y in (cos, sin))
    a, b, c, d = h[:, :half, :half], h[:, :half, half:], h[:, half:, :half], h[:, half:, half:]
    upper, side = a * cc + b * cs + c * sc + d * ss, b * cc - a * cs + d * sc - c * ss
    lower = d * cc - c * cs - b * sc + a * ss
    return torch.cat((torch.cat((upper, side), 2), torch.cat((side.transpose(1, 2), lower), 2)), 1)


def row_factor(h: Tensor) -> Tensor:
    """The upper factor of f64 h[d, d], its rows in the order they come."""
    return gptq.factorise(h, torch.arange(h.shape[0])).upper


def value_grams(block: Block, weights: dict[str, Tensor], site: str) -> Tensor:
    """f64[key heads, k, k]: sums over tokens of what a value head's rows multiply after attention has mixed the tokens."""
    x, k = block.quantized_inputs(), weights[f"{VALUE}.weight"].shape[1]
    total = torch.zeros(block.config.num_key_value_heads, k, k, dtype=torch.float64)
    for part, inputs in zip(chunks(x), rounding.site_inputs(block, weights, site, x), strict=True):
        s = gptq.first_token(inputs).sqrt().unsqueeze(2)
        for window, p in enumerate(rounding.attention(block, weights, part)):
            for head, shares in enumerate(p.unflatten(0, (len(total), -1))):
                mixed = ((shares @ inputs[window]) * s[window]).flatten(0, 1)  # [heads that read it * t, k]
                total[head] += (mixed.T @ mixed).double()
    return total


def round_matrix(w: Tensor, spec: Spec, mask: Tensor | None, statistics: Factor | Heads, bias: Tensor | None, name: str) -> QTensor:
    """Round f32 w[n, k]; where mask[n, k] is true, what w became by the corrections is stored in float16."""
    if isinstance(statistics, Factor):
        return gptq.round_matrix(w, spec, mask, statistics, bias, name)
    require_finite(w, name)
    heads = w.unflatten(0, (statistics.heads, -1))
    masks = [None] * statistics.heads if mask is None else mask.view(heads.shape)
    factors = statistics.columns * (statistics.heads // len(statistics.columns))
    grids = [gptq.grid(part, spec, kept, f.price) for part, kept, f in zip(heads, masks, factors, strict=True)]
    scale, zero = (None if g[0] is None else torch.cat(g) for g in zip(*grids, strict=True))
    if statistics.rows is None:
        done = [gptq.compensate(part, *g, spec, kept, f) for part, g, kept, f in zip(heads, grids, masks, factors, strict=True)]
        codes, values = (torch.cat(t) for t in zip(*done, strict=True))
    else:
        codes, values = compensate_rows(heads, scale, zero, spec, mask, factors[0], statistics.rows)
    return assemble(values, codes, scale, zero, spec, mask, bias, name)


def compensate_rows(
    heads: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec, mask: Tensor | None, factor: Factor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """As `gptq.compensate` for f32 heads[h, d, k], with upper f32[h, d, d] of the rows of each; grid and mask are those of all h * d rows."""
    rest, count = heads.clone(), heads.shape[0]

    def row(t: Tensor | None, r: int) -> Tensor | None:
        return None if t is None else t.view(count, -1, t.shape[1])[:, r]

    codes, values = torch.empty(heads.shape, dtype=torch.uint8), torch.empty_like(heads)
    for r in range(heads.shape[1]):
        s, z, kept = row(scale, r), row(zero, r), row(mask, r)
        codes[:, r], values[:, r] = gptq.compensate(rest[:, r], s, z, spec, kept, factor)
        error = rest[:, r] - assemble(values[:, r], codes[:, r], s, z, spec, kept, None, "row").dequantize()
        rest[:, r + 1 :] -= (upper[:, r, r + 1 :] / upper[:, r, r : r + 1]).unsqueeze(2) * error.unsqueeze(1)
    return codes.flatten(0, 1), values.flatten(0, 1)
