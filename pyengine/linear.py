"""`Linear`: a quantized drop-in for torch.nn.Linear, its weights packed for the kernel that will run.

`Linear.from_float` quantizes one by rounding to nearest, `replace_linears` does so for a whole module; the methods that need data are
in `pyengine.quantizer`. Forward runs our kernels; what torch must see of it, to compile or export it, is in `torch_ops.py`.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _C, memory, ops, torch_ops
from .errors import CheckpointError
from .qtensor import KEYS, QTensor, fit_group

REPACKED = ("weight", "scale", "zero", "column_value")  # for most kernels
CSR = ("outlier_row", "outlier_col", "outlier_value")


class Linear(nn.Module):
    """y = x·wᵀ + bias with a quantized w of n outputs and k inputs.

    act_bits 16 keeps x at 16 bits or more; 8 and 4 quantize every token to integers on the fly, within the ratios `act_clip` f32[2] of its
    highest and lowest value, however few tokens there are: a token's result does not depend on its batch. On a GPU they take symmetric
    weights with one scale a row or in groups of 64 or 128, whole columns but no single outliers, and k a multiple of 16, or of 32 for 4 bits.

    `gated` returns silu(g)·u instead, where g and u are the two halves of those outputs. `kernel` forces a row of the dispatch table by name
    and raises RuntimeError if it refuses; `kernel_name()` says which row runs.

    The weights lie packed for the kernels of `device`: "cpu", "cuda" or "cuda:1", where x must then be in float16 or bfloat16; "meta"
    has none. `.to()`, `.cuda()` and `.cpu()` pack them anew, casts such as `.half()` leave them alone. `state_dict()` has them in the
    canonical form of `QTensor`, on the CPU, whatever the device; `load_state_dict` takes any such form of the same shape.

    There is no backward pass: where torch differentiates, the result says that it needs a gradient, and `backward()` through it raises.
    torch.compile, torch.export, vmap and FakeTensor see the op `pyengine::linear`.
    """

    def __init__(
        self, weight: QTensor, act_bits: int = 16, kernel: str = "", gated: bool = False, act_clip: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        super().__init__()
        if act_bits not in (4, 8, 16):
            raise ValueError(f"Linear: act_bits is {act_bits}, expected 4, 8 or 16")
        if gated and weight.n % 2:
            raise ValueError(f"Linear: {weight.n} outputs cannot be gated, they have no halves")
        if act_clip is not None and not ((ops.check(act_clip, "Linear: act_clip", torch.float32, (2,)) > 0) & (act_clip <= 1)).all():
            raise ValueError(f"Linear: act_clip is {act_clip.tolist()}, expected two ratios above 0 and at most 1")
        if weight.residual is not None:
            raise ValueError("Linear: the weight has a residual, which layers.linear adds")
        self.in_features, self.out_features = weight.k, weight.n // 2 if gated else weight.n
        self.kernel, self.act_bits, self.gated, self.act_clip = kernel, act_bits, gated, act_clip
        self._tensors: dict[str, Tensor] = {}
        self._place(weight.check(), torch.empty(0, device=device).device)

    def _place(self, w: QTensor, device: torch.device) -> None:
        """Pack the weights for the kernels of a device and point the op at them."""
        if device.type != "meta" and device.type not in {row["device"] for row in _C.QLinear.kernels()}:
            raise RuntimeError(f"Linear: this build has no kernels for {device}")
        op, tensors = _C.QLinear(), _canonical(w)
        if self.act_clip is not None:
            tensors["act_clip"] = memory.pack(self.act_clip)
        op.n, op.k, op.group, op.bits, op.act_bits = w.n, w.k, w.group, w.container, self.act_bits
        op.columns, op.scale_f32, op.gated = w.columns, w.scale.dtype == torch.float32, self.gated
        if device.type == "meta":
            tensors = {name: t.to(device) for name, t in tensors.items()}
        else:
            ops.point(op, tensors)
            op.dtype = int(device.type == "cuda")  # any that its kernels take
            if layout := op.target_layout(self.kernel, ops.gpu(device)):
                tensors |= ops.pack(op, layout)
            if device.type == "cuda":  # whose kernels read outliers from lists
                tensors = {name: t.to(device) for name, t in tensors.items() if name not in CSR}
                op.outlier_row = op.outlier_col = op.outlier_value = 0
                ops.point(op, tensors)
        for name in self._tensors:
            del self._buffers[f"packed_{name}"]
        # Buffers, so that torch's tools see them. The op points to those in _tensors, which live on if somebody else replaces a buffer.
        for name, t in tensors.items():
            self.register_buffer(f"packed_{name}", t, persistent=False)
        self._op, self._tensors, self.device = op, tensors, device
        self.form, self.names = tuple(int(getattr(op, field)) for field in ops.FORM), tuple(tensors)
        self.bits, self.group, self.outliers, self.columns = w.container, w.group, w.outliers, w.columns
        self.nbytes, self.weights = w.nbytes, w.n * w.k

    def quantized(self) -> QTensor:
        """The weights in canonical form, on the CPU: a copy. Of a layer on "meta" it has no values either."""
        tensors = {name: t.clone() if t.is_meta else t.to("cpu", copy=True) for name, t in self._tensors.items()}
        if self._op.layout != ops.CANONICAL:
            tensors |= ops.unpack(self._op, tensors, self.outliers)
        if "bias" in tensors:
            tensors["bias"] = tensors["bias"].half()
        return QTensor(k=self.in_features, **{key: t for key, t in tensors.items() if key in KEYS})

    def kernel_name(self, tokens: int = 1) -> str:
        """The row of the dispatch table that forward runs for so many tokens."""
        op = _C.QLinear(self._op)
        op.m = tokens
        return op.choose(self.kernel, ops.gpu(self.device))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None, program: ops.Program | None = None,
        codes: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """x [..., k] → [..., n], in x's dtype. `residual` [m, n] is added; `out` [m, n], which may be the residual, takes the result.

        On the CPU x may be of any floating dtype, residual and out are f32; on a GPU all are f16 or all bf16. With `program` the op is
        recorded instead, to read x f32[m, k] and write the result whenever the program runs. `codes` of x are those that `ops.transform`
        makes for `act_bits` and `act_clip`: where a weight has neither outliers nor columns, x may then hold anything.
        """
        if torch_ops.traced(x):
            return torch_ops.linear(self, x, residual, out)
        return ops.linear(_C.QLinear(self._op), x, self._tensors, self.device, residual, out, codes, self.kernel, program)

    def _apply(self, fn, recurse: bool = True):
        """What `.to()` and its kin do to every tensor: only a change of device concerns the weights."""
        device = fn(self._tensors["weight"].new_empty(0)).device
        packed = {name: self._buffers.pop(name) for name in [f"packed_{name}" for name in self.names]}
        super()._apply(fn, recurse)
        self._buffers |= packed
        if device != self.device:
            w = self.quantized()
            if self.device.type == "meta":  # to_empty(): room for those of a state dict
                w = QTensor(w.k, torch.zeros_like(w.weight, device="cpu"), torch.zeros_like(w.scale, device="cpu"))
            self._place(w, device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + key: t for key, t in self.quantized().tensors().items()})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        found = {key: state_dict[prefix + key].cpu() for key in KEYS if prefix + key in state_dict}
        others = {name: t for name, t in state_dict.items() if not name.startswith(prefix) or name[len(prefix) :] not in KEYS}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys += [prefix + key for key in ("weight", "scale") if key not in found]
        if "weight" not in found or "scale" not in found:
            return
        try:
            weight = QTensor(k=self.in_features, name=prefix[:-1] or "Linear", **found).check(self._op.n)
            self._place(weight, torch.device("cpu") if self.device.type == "meta" else self.device)
        except (CheckpointError, RuntimeError) as e:
            error_msgs.append(str(e))

    def __getstate__(self) -> dict:
        """For copies and pickles: the canonical weights, since what is packed is for this machine and an op has no other state."""
        own = {f"packed_{name}" for name in self.names}
        state = {name: value for name, value in self.__dict__.items() if name not in ("_op", "_tensors")}
        return state | {"_buffers": {name: t for name, t in self._buffers.items() if name not in own}, "_canonical": self.quantized()}

    def __setstate__(self, state: dict) -> None:
        weight = state.pop("_canonical")
        super().__setstate__(state | {"_tensors": {}})
        self._place(weight, self.device)

    def rows(self, token: Tensor, out: Tensor, program: ops.Program | None = None) -> Tensor:
        """Rows token i64[m] of the weights → out f32[m, k]; with `program` recorded instead."""
        return ops.embedding(self._op, token, out, self._tensors, program=program)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group}, "
            f"outliers={self.outliers}, columns={self.columns}, act_bits={self.act_bits}, gated={self.gated}, device={self.device}, "
            f"kernel={self.kernel or 'the best'}"
        )

    @classmethod
    def from_float(
        cls, linear: nn.Linear, bits: int = 4, group_size: int = 128, outliers: float = 0.01, symmetric: bool = True, act_bits: int = 16,
        device: torch.device | str | None = None,
    ) -> Linear:  # fmt: skip
        """Quantize a float linear without data: round to nearest, with the `outliers` share of largest weights kept in FP16.

        `device` is where the result lives; None is where the linear does.
        """
        from .quant.common import Spec, quantize_matrix, top_mask

        spec = Spec(bits=bits, group_size=group_size, symmetric=symmetric, outliers=outliers).check()
        if linear.weight.is_meta:
            raise ValueError("Linear.from_float: the linear is on meta and has no weights to quantize")
        w = linear.weight.detach().cpu().float()
        if group_size not in (0, group := fit_group(group_size, w.shape[1])):
            warnings.warn(f"group size {group_size} does not divide {w.shape[1]} inputs: {group} is used", stacklevel=2)
        bias = None if linear.bias is None else linear.bias.detach().cpu().float()
        return cls(quantize_matrix(w, spec, top_mask(w.abs(), outliers), bias), act_bits, device=linear.weight.device if device is None else device)


def _canonical(w: QTensor) -> dict[str, Tensor]:
    """The tensors of a weight as kernels read them, by the op's names for them."""
    tensors = {key: t for key, t in w.tensors().items() if key in KEYS and (key not in CSR or w.outliers)}
    if w.outliers:
        tensors["outlier_col"] = w.outlier_col.to(torch.uint16 if w.k <= 65536 else torch.int32)
    if w.bias is not None:
        tensors["bias"] = w.bias.float()
    return {key: t.contiguous() if key in REPACKED or t.is_meta else memory.pack(t) for key, t in tensors.items()}


def stack(parts: Sequence[QTensor]) -> QTensor | None:
    """Several weights over the same input as one of all their outputs; None where their formats differ."""
    first, residuals = parts[0], [(i, p.residual) for i, p in enumerate(parts) if p.residual is not None]
    residual = stack([r for _, r in residuals]) if residuals else None
    alike = all(
        (p.k, p.group, p.container, p.scale.dtype, p.zero is None, p.bias is None)
        == (first.k, first.group, first.container, first.scale.dtype, first.zero is None, first.bias is None)
        and (torch.equal(p.column_index, first.column_index) if p.columns and first.columns else p.columns == first.columns)
        for p in parts
    )
    if not alike or residuals and residual is None:
        return None
    if residuals and (len(residuals) < len(parts) or any(r.rows is not None for _, r in residuals)):
        before = [sum(p.n for p in parts[:i]) for i, _ in residuals]
        residual.rows = torch.cat([b + (torch.arange(r.n) if r.rows is None else r.rows).int() for b, (_, r) in zip(before, residuals)])
    rows = (key for key in ("weight", "scale", "zero", "bias", "column_value") if getattr(first, key) is not None)
    joined = {key: torch.cat([getattr(p, key) for p in parts]) for key in rows}
    if any(p.outliers for p in parts):
        joined |= _stack_outliers(parts)
    return QTensor(k=first.k, name=first.name, column_index=first.column_index, residual=residual, **joined)


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
