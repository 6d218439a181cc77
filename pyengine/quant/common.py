"""Arithmetic that the methods share: the request (`Spec`), the grid of a group, rounding onto it, and exact top-k masks.

Fixed order, whatever the method: choose the mask, fit the grid without the masked weights, round, store the masked weights
in float16 beside codes that say zero at their places. Scales are rounded to the float type they are stored in before
codes are computed, so that the file holds the best codes for the scales it holds.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..qtensor import BITS, GROUPS, ORDERS, QTensor, fit_group, outliers_from_mask, pack_codes

FLOAT16_MAX = 65504.0
# The smallest positive float16: the scale of a group that has nothing to scale. Zero would turn x / scale into NaN.
TINY_SCALE = 2.0**-24
SCORES = ("abs_g", "sq_g", "abs_g_dw", "fisher_dw2", "hdiag_dw2", "abs_w")
SCOPES = ("tensor", "global", "row", "structured", "columns")  # quant/outliers.py


@dataclass(frozen=True)
class Spec:
    """What is asked of a method. None is for the method's `complete` to fill in; samples 0 then means that no text is read."""

    method: str = "gwq"
    bits: int = 4
    group_size: int = 128  # 0: one group a row
    symmetric: bool = True
    outliers: float = 0.01  # share of the weights of each matrix that stay float16
    score: str | None = None
    scope: str | None = None
    rounding: str | None = None  # how the weights outside the mask get their codes: a file of this folder with `round_matrix` or `round_block`
    grid: str | None = None  # "range" spans a group's weights, "search" is the cheapest of some that clip
    orders: int | None = None  # matrices that a weight is the sum of
    rows: float | None = None  # share of the outputs that have more than one
    # (pattern, bits, group size or None) of linears by name: what the first one that matches says holds instead of bits and group_size
    bits_map: tuple[tuple[str, int, int | None], ...] = ()
    target_bits: float | None = None  # bits per weight, as files count them, for methods that choose the rest
    act_bits: int = 16
    kv_bits: int = 16
    head_bits: int = 8
    samples: int | None = None
    seq_len: int | None = None
    steps: int | None = None  # of training, for each block
    seed: int = 0

    @property
    def container(self) -> int:
        """Bits that a code occupies in the file."""
        return 8 if self.bits == 8 else 4

    def at(self, name: str) -> Spec:
        """What is asked for the linear `name` ("model.layers.3.mlp.down_proj"). A pattern may leave out how the name begins, up to a dot."""
        for pattern, bits, group in self.bits_map:
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}"):
                return replace(self, bits=bits, group_size=self.group_size if group is None else group, bits_map=())
        return self

    def check(self) -> Spec:
        """Raise ValueError with the value and the allowed ones; returns self."""
        _one_of("bits", self.bits, BITS)
        _one_of("group_size", self.group_size, (0, *reversed(GROUPS)))
        for pattern, bits, group in self.bits_map:
            _one_of(f"bits of {pattern!r}", bits, BITS)
            _one_of(f"group_size of {pattern!r}", group, (None, 0, *reversed(GROUPS)))
        _one_of("symmetric", self.symmetric, (True, False))
        _one_of("score", self.score, (None, *SCORES))
        _one_of("grid", self.grid, (None, "range", "search"))
        _one_of("scope", self.scope, (None, *SCOPES))
        _one_of("act_bits", self.act_bits, (4, 8, 16))
        _one_of("kv_bits", self.kv_bits, (4, 8, 16))
        _one_of("head_bits", self.head_bits, (8, 16))
        if self.outliers != 0 or isinstance(self.outliers, bool):
            _within("outliers", self.outliers, 0, 0.5, "a share of the weights between 0 and 0.5 (0.01 is 1 %)")
        if self.rows is not None:
            _within("rows", self.rows, 0, 1, "a share of the outputs above 0 and at most 1")
        if self.target_bits is not None:
            _within("target_bits", self.target_bits, 0, 16, "bits per weight above 0 and at most 16")
        most = 1 << 20
        counts = (("samples", 1, most), ("seq_len", 2, most), ("steps", 0, most), ("orders", 1, ORDERS), ("seed", 0, (1 << 63) - 1))
        for name, low, high in counts:
            value = getattr(self, name)
            if value is None and name != "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}, expected an integer from {low} to {high}")
        return self


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, allowed))}")


def _within(name: str, value: object, above: float, most: float, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value <= most:
        raise ValueError(f"{name} is {value!r}, expected {what}")


@dataclass
class Block:
    """One transformer block as a method gets it."""

    index: int
    prefix: str  # of its tensors in messages: "model.layers.3."
    weights: dict[str, Tensor]  # f32, by their name inside the block
    sites: dict[str, tuple[str, ...]]  # the linears that are quantized, by the input they share
    forward: Callable | None = None  # forward(weights, x[b, t, hidden], hook, edit): the block in float
    folder: Path | None = None  # where the method's `prepare` left its notes, and `quantize_block` may leave some
    config: object | None = None  # the Config of pyengine/models/<model_type>.py
    rope: tuple[Tensor, Tensor] | None = None  # cos and sin of the windows' positions, f32[t, head_dim/2]
    notes: dict[str, object] = field(default_factory=dict)  # what a rounding keeps from one site for the next
    quantized_inputs: Callable[[], Tensor] | None = None  # f32[s, t, hidden]: the inputs as the quantized blocks before make them

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for site in self.sites.values() for name in site)


def fit_grid(w: Tensor, bits: int, group: int, symmetric: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of each group of w[n, k], fitted to the entries outside mask[n, k].

    Returns (scale f16[n, k/group], zero u8[n, k/group] or None if symmetric). The scale is f32 where one of the matrix does
    not fit float16.
    """
    kept = (w if mask is None else w.masked_fill(mask, 0.0)).unflatten(1, (-1, group))
    if symmetric:
        scale = kept.abs().amax(2) / (2 ** (bits - 1) - 1)
    else:
        # Masked entries count as zero above; the range holds zero anyway, because zero must be a code.
        low, high = kept.amin(2).clamp(max=0.0), kept.amax(2).clamp(min=0.0)
        scale = (high - low) / (2**bits - 1)
    scale = scale.clamp(min=TINY_SCALE)
    if float(scale.max()) <= FLOAT16_MAX:
        scale = scale.half()
    if symmetric:
        return scale, None
    return scale, torch.round(-low / scale.float()).clamp(0, 2**bits - 1).to(torch.uint8)


def round_codes(w: Tensor, scale: Tensor, zero: Tensor | None, bits: int, container: int) -> Tensor:
    """u8[n, k]: w[n, k] rounded half-to-even onto its grid; symmetric codes are stored in excess of 2**(container-1)."""
    steps = torch.round(w.unflatten(1, (scale.shape[1], -1)) / scale.float().unsqueeze(2))
    if zero is None:
        codes = steps.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (container - 1)
    else:
        codes = (steps + zero.float().unsqueeze(2)).clamp(0, 2**bits - 1)
    return codes.flatten(1).to(torch.uint8)


def quantize_matrix(w: Tensor, spec: Spec, mask: Tensor | None = None, bias: Tensor | None = None, name: str = "weight") -> QTensor:
    """Round f32 w[n, k] onto the grid that `spec` asks for; where mask[n, k] is true the weight is stored in float16.

    With scope "columns" the mask consists of whole columns, which are stored as such. A group size that does not divide k falls back as
    `fit_group` says. Raises CheckpointError if w or bias is not finite, or if a weight under the mask or a bias does not fit float16
    (no trained model has one; clipping it would be silent damage).
    """
    require_finite(w, name)
    scale, zero = fit_grid(w, spec.bits, fit_group(spec.group_size, w.shape[1]), spec.symmetric, mask)
    return assemble(w, round_codes(w, scale, zero, spec.bits, spec.container), scale, zero, spec, mask, bias, name)


def assemble(
    w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec, mask: Tensor | None, bias: Tensor | None, name: str
) -> QTensor:
    """The stored form of u8 codes[n, k] on the grid that `spec` asked for; where mask[n, k] is true, of w[n, k] in float16."""
    k, container = w.shape[1], spec.container
    q = QTensor(k=k, weight=codes, scale=scale, zero=zero, name=name)
    if mask is not None and bool(mask.any()):
        require_float16(w[mask], f"{name}: an outlier")
        zeros = torch.full_like(scale, 2 ** (container - 1), dtype=torch.uint8) if zero is None else zero
        codes = torch.where(mask, zeros.repeat_interleave(k // scale.shape[1], 1), codes)
        if spec.scope == "columns":
            columns = mask[0].nonzero().flatten()
            q.column_index, q.column_value = columns.int(), w[:, columns].half()
        else:
            q.outlier_row, q.outlier_col, q.outlier_value = outliers_from_mask(w, mask)
    q.weight = pack_codes(codes, container)
    if bias is not None:
        require_finite(bias, f"{name} bias")
        require_float16(bias, f"{name}: a bias")
        q.bias = bias.half()
    return q


def rounding_error(w: Tensor, spec: Spec) -> Tensor:
    """f32[n, k]: w minus what plain rounding to the same bits and group would store."""
    scale, zero = fit_grid(w, spec.bits, fit_group(spec.group_size, w.shape[1]), spec.symmetric)
    codes = round_codes(w, scale, zero, spec.bits, 8).float().unflatten(1, (scale.shape[1], -1))
    zeros = 128.0 if zero is None else zero.float().unsqueeze(2)
    return w - ((codes - zeros) * scale.float().unsqueeze(2)).flatten(1)


def top_mask(score: Tensor, share: float) -> Tensor:
    """bool like score: exactly floor(share * numel) largest entries; equal scores go to the lower flat index.

    torch.topk promises no order among equals, and then two runs could write different files.
    """
    flat = score.flatten()
    count = int(share * flat.numel())
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    if count:
        last = flat.topk(count, sorted=False).values.min()
        mask = flat > last
        ties = (flat == last).nonzero().flatten()
        mask[ties[: count - int(mask.sum())]] = True
    return mask.view(score.shape)


def require_finite(t: Tensor, name: str) -> None:
    """Raise CheckpointError naming the tensor if a value is NaN or infinite."""
    if not bool(torch.isfinite(t).all()):
        raise CheckpointError(f"{name}: {int((~torch.isfinite(t)).sum())} of {t.numel()} values are NaN or infinite")


def require_float16(t: Tensor, what: str) -> None:
    """Raise CheckpointError if a value overflows float16."""
    if t.numel() and float(t.abs().max()) > FLOAT16_MAX:
        raise CheckpointError(f"{what} of magnitude {float(t.abs().max()):g} does not fit float16 (at most {FLOAT16_MAX:g})")
