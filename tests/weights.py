"""Random quantized weights and the outlier masks that break kernels: gradients put outliers into few rows and columns."""

from __future__ import annotations

import torch

from pyengine.qtensor import QTensor, outliers_from_mask, pack_codes

MASKS = ("none", "sparse", "full_row", "full_column", "one_tile", "last_corner", "dense")


def outlier_mask(kind: str, n: int, k: int) -> torch.Tensor:
    mask = torch.zeros(n, k, dtype=torch.bool)
    if kind == "sparse":
        mask |= torch.rand(n, k) < 0.01
    elif kind == "full_row":
        mask[n // 2] = True
    elif kind == "full_column":
        mask[:, k // 3] = True
    elif kind == "one_tile":
        mask[:16, :64] = torch.rand(min(n, 16), min(k, 64)) < 0.7
    elif kind == "last_corner":
        mask[-1, -1] = True
    elif kind == "dense":
        mask |= torch.rand(n, k) < 0.5
    return mask


def random_weight(
    n: int, k: int, group: int, bits: int = 4, asymmetric: bool = False, mask: str = "none", bias: bool = False, scale_f32: bool = False, columns: int = 0
) -> QTensor:
    codes = torch.randint(0, 1 << bits, (n, k)).to(torch.uint8)
    groups = k // group
    zero = torch.randint(0, 1 << bits, (n, groups)).to(torch.uint8) if asymmetric else None
    zeros = zero if asymmetric else torch.full((n, groups), 1 << (bits - 1), dtype=torch.uint8)
    chosen, whole = outlier_mask(mask, n, k), torch.zeros(k, dtype=torch.bool)
    if columns:
        whole[torch.randperm(k)[:columns]] = True
        chosen &= ~whole
    codes = torch.where(chosen | whole, zeros.repeat_interleave(group, 1), codes)
    outliers = outliers_from_mask(torch.randn(n, k), chosen) if chosen.any() else (None, None, None)
    scale = torch.rand(n, groups) * 0.1 + 0.01
    kept = {"column_index": whole.nonzero().flatten().int(), "column_value": torch.randn(n, columns).half()} if columns else {}
    scale = scale if scale_f32 else scale.half()
    return QTensor(k, pack_codes(codes, bits), scale, zero, *outliers, **kept, bias=torch.randn(n).half() if bias else None).check()
