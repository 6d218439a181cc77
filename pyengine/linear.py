"""`Linear`: a quantized drop-in for torch.nn.Linear, its weights packed for the kernel that will run.

`Linear.from_float` quantizes one by rounding to nearest, `replace_linears` does so for a whole module; the methods that need data are
in `pyengine.quantizer`. Forward runs our kernels and has no backward pass.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _C, memory, ops
from .qtensor import QTensor, fit_group

CANONICAL = ("weight", "scale", "zero", "column_value")  # tensors that are packed anew for most kernels


class Linear(nn.Module):
    """y = x·wᵀ + bias with a quantized w of n outputs and k inputs.

    act_bits 16 keeps x at 16 bits or more; 8 and 4 quantize every token to integers on the fly, within the ratios `act_clip` f32[2] of its
    highest and lowest value. `gated` returns silu(g)·u instead, where g and u
    are the two halves of those outputs. `kernel` forces a row of the dispatch table by name and raises RuntimeError if it refuses;
    `kernel_name()` says which row runs.
    """

    def __init__(self, weight: QTensor, act_bits: int = 16, kernel: str = "", gated: bool = False, act_clip: Tensor | None = None):
        super().__init__()
        if act_bits not in (4, 8, 16):
            raise ValueError(f"Linear: act_bits is {act_bits}, expected 4, 8 or 16")
        if gated and weight.n % 2:
            raise ValueError(f"Linear: {weight.n} outputs cannot be gated, they have no halves")
        if act_clip is not None and not ((ops.check(act_clip, "Linear: act_clip", torch.float32, (2,)) > 0) & (act_clip <= 1)).all():
            raise ValueError(f"Linear: act_clip is {act_clip.tolist()}, expected two ratios above 0 and at most 1")
        weight.check()
        self.in_features, self.out_features = weight.k, weight.n // 2 if gated else weight.n
        self.bits, self.group, self.outliers = weight.container, weight.group, weight.outliers
        self.columns = weight.columns
        self.nbytes, self.weights = weight.nbytes, weight.n * weight.k
        self.kernel = kernel
        self._op = op = _C.QLinear()
        op.n, op.k, op.group, op.bits, op.act_bits = weight.n, weight.k, weight.group, weight.container, act_bits
        op.columns, op.scale_f32, op.gated = weight.columns, weight.scale.dtype == torch.float32, gated
        self._keep(weight, act_clip)
        layout = op.target_layout(kernel)
        if layout:
            self._tensors |= ops.pack(op, layout)

    def _keep(self, w: QTensor, act_clip: Tensor | None) -> None:
        """Hold the canonical tensors and point the op at them. They are no buffers: `module.to(dtype)` would free what the op points to."""
        bias = None if w.bias is None else w.bias.float()
        col = None if not w.outliers else w.outlier_col.to(torch.uint16 if w.k <= 65536 else torch.int32).contiguous()
        row, value = (w.outlier_row, w.outlier_value) if w.outliers else (None, None)
        tensors = {"weight": w.weight, "scale": w.scale, "zero": w.zero, "bias": bias, "act_clip": act_clip}
        tensors |= {"outlier_row": row, "outlier_col": col, "outlier_value": value}
        if w.columns:
            tensors |= {"column_index": w.column_index, "column_value": w.column_value}
        self._tensors = {name: None if t is None else t.contiguous() if name in CANONICAL else memory.pack(t) for name, t in tensors.items()}
        for name, t in self._tensors.items():
            setattr(self._op, name, 0 if t is None else t.data_ptr())

    def kernel_name(self, tokens: int = 1) -> str:
        """The row of the dispatch table that forward runs for so many tokens."""
        op = _C.QLinear(self._op)
        op.m = tokens
        return op.choose(self.kernel)

    def forward(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, program: ops.Program | None = None) -> Tensor:
        """x [..., k] → [..., n], in x's dtype. `residual` f32[m, n] is added; `out` f32[m, n], which may be the residual, takes the result.

        With `program` the op is recorded instead, to read x f32[m, k] and write the result whenever the program runs.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"Linear: x has {x.shape[-1]} features, expected {self.in_features}")
        if x.device.type != "cpu" or not x.is_floating_point():
            raise ValueError(f"Linear: x is {str(x.dtype)[6:]} on {x.device}, expected floats on the CPU")
        rows = x.reshape(-1, self.in_features).float()
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        m = rows.shape[0]
        y = rows.new_empty(m, self.out_features) if out is None else ops.check(out, "Linear: out", torch.float32, (m, self.out_features))
        if residual is not None and self._op.gated:
            raise ValueError("Linear: a gated result takes no residual")
        if residual is not None and (ops.check(residual, "Linear: residual", torch.float32, y.shape).stride(0) != y.stride(0)):
            raise ValueError("Linear: residual and out must have the same row stride")
        op = _C.QLinear(self._op)  # of this call: another thread may run the same layer
        op.m, op.x, op.x_stride = m, rows.data_ptr(), rows.stride(0)
        op.y, op.y_stride = y.data_ptr(), y.stride(0)
        op.residual = 0 if residual is None else residual.data_ptr()
        if m:
            ops.go(op, self.kernel, program, self, rows, y, residual, memory.workspace(op))
        return y if out is not None else y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def rows(self, token: Tensor, out: Tensor, program: ops.Program | None = None) -> Tensor:
        """Rows token i64[m] of the weights → out f32[m, k]; with `program` recorded instead."""
        return ops.embedding(self._op, token, out, self, program=program)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group}, "
            f"outliers={self.outliers}, columns={self.columns}, act_bits={self._op.act_bits}, gated={self._op.gated}, "
            f"kernel={self.kernel or 'the best'}"
        )

    @classmethod
    def from_float(
        cls, linear: nn.Linear, bits: int = 4, group_size: int = 128, outliers: float = 0.01, symmetric: bool = True, act_bits: int = 16
    ) -> Linear:
        """Quantize a float linear without data: round to nearest, with the `outliers` share of largest weights kept in FP16."""
        from .quant.common import Spec, quantize_matrix, top_mask

        spec = Spec(bits=bits, group_size=group_size, symmetric=symmetric, outliers=outliers).check()
        w = linear.weight.detach().float()
        if group_size not in (0, group := fit_group(group_size, w.shape[1])):
            warnings.warn(f"group size {group_size} does not divide {w.shape[1]} inputs: {group} is used", stacklevel=2)
        bias = None if linear.bias is None else linear.bias.detach().float()
        return cls(quantize_matrix(w, spec, top_mask(w.abs(), outliers), bias), act_bits)


def stack(parts: Sequence[QTensor]) -> QTensor | None:
    """Several weights over the same input as one of all their outputs; None where their formats differ."""
    first = parts[0]
    alike = all(
        (p.k, p.group, p.container, p.scale.dtype, p.zero is None, p.bias is None)
        == (first.k, first.group, first.container, first.scale.dtype, first.zero is None, first.bias is None)
        and (torch.equal(p.column_index, first.column_index) if p.columns and first.columns else p.columns == first.columns)
        for p in parts
    )
    if not alike:
        return None
    rows = (key for key in ("weight", "scale", "zero", "bias", "column_value") if getattr(first, key) is not None)
    joined = {key: torch.cat([getattr(p, key) for p in parts]) for key in rows}
    if any(p.outliers for p in parts):
        joined |= _stack_outliers(parts)
    return QTensor(k=first.k, name=first.name, column_index=first.column_index, **joined)


def _stack_outliers(parts: Sequence[QTensor]) -> dict[str, Tensor]:
    rows, cols, values, before = [torch.zeros(1, dtype=torch.int32)], [], [], 0
    for p in parts:
        counts = p.outlier_row[1:] if p.outliers else torch.zeros(p.n, dtype=torch.int32)
        rows.append(counts + before)
        if p.outliers:
            cols.append(p.outlier_col.to(torch.int32))
            values.append(p.outlier_value)
        before += p.outliers
    col = torch.cat(cols).to(torch.uint16 if parts[0].k <= 65536 else torch.int32)
    return {"outlier_row": torch.cat(rows), "outlier_col": col, "outlier_value": torch.cat(values)}


def replace_linears(module: nn.Module, include: str = "*", exclude: Sequence[str] = ("*lm_head*",), **spec) -> list[str]:
    """Replace every nn.Linear of `module` whose dotted name matches `include` and none of `exclude` by `Linear.from_float(…, **spec)`.

    Returns the names that were replaced.
    """
    names = [
        name
        for name, child in module.named_modules()
        if type(child) is nn.Linear and fnmatch.fnmatch(name, include) and not any(fnmatch.fnmatch(name, p) for p in exclude)
    ]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, Linear.from_float(module.get_submodule(name), **spec))
    return names
