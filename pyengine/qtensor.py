"""The quantized-weight format: what it holds, what must be true of it, and how it turns back into floats.

    w[j, c] = scale[j, c // group] * (code[j, c] - zero[j, c // group]),   then outlier values and columns replace w at their places,
                                                                  and a residual, itself such a matrix, is added to its rows

`csrc/ops.h` states the same layout for the kernels. Checkpoints hold exactly these tensors under `<module>.`;
what a kernel wants otherwise is repacked at load (`csrc/pack.cpp`) and never saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import CheckpointError

KEYS = ("weight", "scale", "zero", "outlier_row", "outlier_col", "outlier_value", "column_index", "column_value", "bias")
GROUPS = (128, 64, 32)  # group sizes with kernels, largest first; 0 means one group a row
BITS = (2, 3, 4, 8)
ORDERS = 8  # most matrices that one weight is the sum of


def fit_group(group: int, k: int) -> int:
    """The group size that is used when `group` is asked for: itself if it divides k, else the largest smaller one that does, else k."""
    if group <= 0 or group >= k:
        return k
    if k % group == 0:
        return group
    return next((g for g in GROUPS if g < group and k % g == 0), k)


def pack_codes(codes: Tensor, container: int) -> Tensor:
    """u8[n, k] codes → u8[n, ceil(k * container / 8)]; 4-bit containers put the even column in the low nibble."""
    if container == 8:
        return codes.to(torch.uint8).contiguous()
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()


def unpack_codes(weight: Tensor, k: int, container: int) -> Tensor:
    """The inverse of `pack_codes`: u8[n, k]."""
    if container == 8:
        return weight
    return torch.stack((weight & 15, weight >> 4), dim=2).flatten(1)[:, :k].contiguous()


@dataclass
class QTensor:
    """One quantized weight matrix of n outputs and k inputs, in canonical layout, on the CPU.

    weight u8[n, ceil(k*container/8)]   codes; container is 4 (bits 2..4) or 8
    scale  f16|f32[n, k/group]
    zero   u8[n, k/group] or None       None means 2**(container-1): 8 or 128
    outlier_row i32[n+1], outlier_col u16|i32[nnz], outlier_value f16[nnz]   CSR, columns ascending in a row, or all None
    column_index i32[c], column_value f16[n, c]   inputs that are kept whole in f16, ascending, without CSR outliers; or both None
    bias   f16[n] or None
    residual  what is added to the rows that it names: its n counts them, and it has no bias; or None
    rows   i32[n], of a residual: to which rows of the matrix it belongs to its own are added, ascending; None is all
    """

    k: int
    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None
    outlier_row: Tensor | None = None
    outlier_col: Tensor | None = None
    outlier_value: Tensor | None = None
    column_index: Tensor | None = None
    column_value: Tensor | None = None
    bias: Tensor | None = None
    residual: QTensor | None = None
    rows: Tensor | None = None
    name: str = field(default="weight", compare=False)

    @property
    def n(self) -> int:
        return self.weight.shape[0]

    @property
    def group(self) -> int:
        return self.k // self.scale.shape[1]

    @property
    def container(self) -> int:
        """Bits a code occupies: 4 or 8."""
        return 8 if self.weight.shape[1] == self.k and self.k > 1 else 4

    @property
    def outliers(self) -> int:
        return 0 if self.outlier_value is None else self.outlier_value.numel()

    @property
    def columns(self) -> int:
        """Inputs that are kept whole in f16."""
        return 0 if self.column_index is None else self.column_index.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored in a file."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by their key, those that exist."""
        own = {key: t for key in (*KEYS, "rows") if (t := getattr(self, key)) is not None}
        return own | ({} if self.residual is None else {f"residual.{key}": t for key, t in self.residual.tensors().items()})

    @classmethod
    def read(cls, name: str, n: int, k: int, get: Callable[[str], Tensor | None]) -> QTensor:
        """Collect `<name>.<key>` tensors through `get` (None where absent) and check every invariant for an n × k matrix."""
        return cls._collect(name, k, get, ORDERS).check(n)

    @classmethod
    def _collect(cls, name: str, k: int, get: Callable[[str], Tensor | None], orders: int) -> QTensor:
        found = {key: get(f"{name}.{key}") for key in KEYS}
        for key in ("weight", "scale"):
            if found[key] is None:
                raise CheckpointError(f"{name}.{key}: missing from the checkpoint")
        q = cls(k=k, name=name, **found)
        if any(get(f"{name}.residual.{key}") is not None for key in ("weight", "scale", "rows")):
            if orders == 1:
                raise CheckpointError(f"{name}.residual: a weight is the sum of at most {ORDERS} matrices")
            q.residual = cls._collect(f"{name}.residual", k, get, orders - 1)
            q.residual.rows = get(f"{name}.residual.rows")
        return q

    def check(self, n: int | None = None) -> QTensor:
        """Refuse anything a kernel could read out of bounds or turn into NaN. Returns self."""
        n = self.n if n is None else n
        k = self.k
        if n < 1 or k < 2:
            raise CheckpointError(f"{self.name}: a matrix of {n} × {k} is not supported, expected at least 1 × 2")
        self._expect("weight", (torch.uint8,), None)
        allowed = [(n, k), (n, (k + 1) // 2)]
        if tuple(self.weight.shape) not in allowed:
            self._fail("weight", f"shape {list(self.weight.shape)}, expected {list(allowed[1])} (4 bits) or {list(allowed[0])} (8 bits)")
        self._expect("scale", (torch.float16, torch.float32), None)
        groups = self.scale.shape[1] if self.scale.dim() == 2 else 0
        if self.scale.dim() != 2 or self.scale.shape[0] != n or groups < 1 or k % groups:
            self._fail("scale", f"shape {list(self.scale.shape)}, expected [{n}, k/group] with a group that divides k = {k}")
        if self.group != k and self.group not in GROUPS:
            self._fail("scale", f"group size {self.group}; supported are 32, 64, 128 and whole rows ({k})")
        if not torch.isfinite(self.scale).all():
            self._fail("scale", f"{int((~torch.isfinite(self.scale)).sum())} values are NaN or infinite")
        if self.zero is not None:
            self._expect("zero", (torch.uint8,), (n, groups))
        if self.bias is not None:
            self._expect("bias", (torch.float16,), (n,))
            if not torch.isfinite(self.bias).all():
                self._fail("bias", "contains NaN or infinite values")
        self._check_columns(n)
        self._check_outliers(n)
        if self.residual is not None:
            self.residual._check_residual(n, k)
        return self

    def _check_residual(self, n: int, k: int) -> None:
        """This one belongs to a matrix of n rows."""
        if self.k != k or self.bias is not None:
            bias = "" if self.bias is None else " with a bias"
            raise CheckpointError(f"{self.name}: a residual of {self.k} inputs{bias}, expected {k} and no bias")
        if self.rows is None:
            self.check(n)
            return
        self._expect("rows", (torch.int32,), (self.rows.numel(),))
        rows = self.rows.long()
        if not len(rows) or int(rows[0]) < 0 or int(rows[-1]) >= n or (rows.diff() <= 0).any():
            self._fail("rows", f"must rise strictly within 0..{n - 1}")
        self.check(len(rows))

    def _check_columns(self, n: int) -> None:
        if self.column_index is None and self.column_value is None:
            return
        if self.column_index is None or self.column_value is None:
            raise CheckpointError(f"{self.name}: column_index and column_value must exist together")
        self._expect("column_index", (torch.int32,), (self.columns,))
        self._expect("column_value", (torch.float16,), (n, self.columns))
        if not self.columns:
            self._fail("column_index", "is empty; without columns neither tensor is there")
        index = self.column_index.long()
        if int(index.min()) < 0 or int(index.max()) >= self.k:
            self._fail("column_index", f"column {int(index.max())} is out of range for k = {self.k}")
        if (index.diff() <= 0).any():
            self._fail("column_index", "columns must rise strictly")
        if not torch.isfinite(self.column_value).all():
            self._fail("column_value", "contains NaN or infinite values")
        self._check_zero_codes(*(t.flatten() for t in torch.meshgrid(torch.arange(n), index, indexing="ij")), "column")

    def _check_outliers(self, n: int) -> None:
        parts = (self.outlier_row, self.outlier_col, self.outlier_value)
        if all(p is None for p in parts):
            return
        if any(p is None for p in parts):
            raise CheckpointError(f"{self.name}: outlier_row, outlier_col and outlier_value must exist together")
        self._expect("outlier_row", (torch.int32,), (n + 1,))
        nnz = self.outlier_value.numel()
        self._expect("outlier_col", (torch.uint16, torch.int32), (nnz,))
        self._expect("outlier_value", (torch.float16,), (nnz,))
        row, col = self.outlier_row.long(), self.outlier_col.to(torch.int64)
        if row[0] != 0 or row[-1] != nnz or (row.diff() < 0).any():
            self._fail("outlier_row", f"must rise from 0 to {nnz}, has {int(row[0])}..{int(row[-1])}")
        if nnz == 0:
            return
        if int(col.min()) < 0 or int(col.max()) >= self.k:
            self._fail("outlier_col", f"column {int(col.max())} is out of range for k = {self.k}")
        owner = torch.repeat_interleave(torch.arange(n), row.diff())
        flat = owner * self.k + col
        if (flat.diff() <= 0).any():
            self._fail("outlier_col", "columns of a row must rise strictly")
        if not torch.isfinite(self.outlier_value).all():
            self._fail("outlier_value", "contains NaN or infinite values")
        if self.columns and (twice := torch.isin(col, self.column_index.long())).any():
            self._fail("outlier_col", f"column {int(col[twice][0])} is kept whole in column_value")
        self._check_zero_codes(owner, col, "outlier")

    def _check_zero_codes(self, row: Tensor, col: Tensor, what: str) -> None:
        """The dense codes at what is kept in f16, places row i64[p] and col i64[p], must add nothing."""
        if self.container == 8:
            codes = self.weight[row, col]
        else:
            codes = (self.weight[row, col // 2] >> (4 * (col % 2)).to(torch.uint8)) & 15
        zeros = self.zero_codes()[row, col // self.group]
        if (codes != zeros).any():
            at = int((codes != zeros).nonzero()[0])
            self._fail("weight", f"code {int(codes[at])} at {what} ({int(row[at])}, {int(col[at])}), expected the zero code {int(zeros[at])}")

    def _expect(self, key: str, dtypes: tuple, shape: tuple | None) -> None:
        t = getattr(self, key)
        if t.dtype not in dtypes:
            self._fail(key, f"dtype {str(t.dtype)[6:]}, expected {' or '.join(str(d)[6:] for d in dtypes)}")
        if shape is not None and tuple(t.shape) != shape:
            self._fail(key, f"shape {list(t.shape)}, expected {list(shape)}")

    def _fail(self, key: str, why: str) -> None:
        raise CheckpointError(f"{self.name}.{key}: {why}")

    def zero_codes(self) -> Tensor:
        """u8[n, k/group]: the zero codes, also where they are implied."""
        if self.zero is not None:
            return self.zero
        return torch.full(self.scale.shape, 1 << (self.container - 1), dtype=torch.uint8)

    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        """f32[n, k] (or the chosen rows of it): the matrix that the kernels multiply by."""
        if self.residual is not None:
            return self._sum()[slice(None) if rows is None else rows]
        if rows is None:
            rows = slice(None)
        codes = unpack_codes(self.weight[rows], self.k, self.container)
        zero = 1 << (self.container - 1) if self.zero is None else self.zero[rows].float().unsqueeze(2)
        centred = codes.float().unflatten(1, (-1, self.group)) - zero
        w = (centred * self.scale[rows].float().unsqueeze(2)).flatten(1)
        if self.columns:
            w[:, self.column_index.long()] = self.column_value[rows].float()
        if self.outliers:
            picked = torch.arange(self.n)[rows]
            counts = self.outlier_row.diff()[picked]
            first = self.outlier_row[picked].long()
            owner = torch.repeat_interleave(torch.arange(len(picked)), counts)
            start = torch.repeat_interleave(first - torch.cumsum(counts, 0) + counts, counts)
            entry = start + torch.arange(int(counts.sum()))
            w[owner, self.outlier_col[entry].to(torch.int64)] = self.outlier_value[entry].float()
        return w

    def _sum(self) -> Tensor:
        w, at = replace(self, residual=None).dequantize(), slice(None) if self.residual.rows is None else self.residual.rows.long()
        w[at] += self.residual.dequantize()
        return w


def outliers_from_mask(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR of the entries of w[n, k] where mask[n, k] is true: (row i32[n+1], col u16|i32[nnz], value f16[nnz])."""
    n, k = w.shape
    owner, col = mask.nonzero(as_tuple=True)
    row = torch.zeros(n + 1, dtype=torch.int32)
    row[1:] = torch.cumsum(torch.bincount(owner, minlength=n), 0)
    return row, col.to(torch.uint16 if k <= 65536 else torch.int32), w[owner, col].to(torch.float16)
