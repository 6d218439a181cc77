"""The border to the native kernels: tensors are checked here, once, and go on as pointers.

Every function takes `kernel=` to force a row of the dispatch table by name; without it the best one for this machine runs.
With `program=` the op is recorded instead of run. Activations are float32 on the CPU, float16 or bfloat16 on a GPU, in its current stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, float32, int32, int64, uint8

from . import _C, memory

CPU = torch.device("cpu")
DTYPES = {float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of activations: ops.h, Dtype
CANONICAL, MMA = 0, 1  # ops.h, Layout; the others are the number of rows in a tile
# The fields of a QLinear that say what its tensors hold. With the tensors they are all that a forward needs.
FORM = ("n", "k", "group", "bits", "act_bits", "layout", "columns", "scale_f32", "gated")
KV_DTYPES = {16: torch.float16, 8: torch.int8, 4: torch.uint8}  # of the KV cache, by its bits; two codes of 4 bits share a byte


class Program:
    """Recorded ops, run in one native call as often as wanted over the same tensors: what a CUDA graph is on a GPU."""

    def __init__(self) -> None:
        self._native, self._kept = _C.Program(), []

    def add(self, op, kernel: str, *owners: object) -> None:
        """Record an op and keep the tensors alive that it points to, or what owns them."""
        self._native.add(op, kernel)
        self._kept.append(owners)

    def run(self) -> None:
        self._native.run()

    def time(self) -> list[tuple[str, float]]:
        """Run, and tell the kernel of each op and its seconds."""
        return self._native.time()


def gpu(device: torch.device) -> int:
    """The number of a GPU as the native module takes it: −1 stands for none."""
    return device.index if device.type == "cuda" else -1


def go(op, kernel: str, program: Program | None, *owners: object) -> None:
    """Run a CPU op now, or record it together with the tensors that it points to, or what owns them."""
    if program is None:
        op.run(kernel=kernel)
    else:
        program.add(op, kernel, *owners)


def kernels(device: int = -1) -> dict[str, list[dict]]:
    """The dispatch table: op → rows with name, device, rank, layout and what this machine is missing for them (None if nothing).

    GPUs differ: `device` is the number of the one that CUDA rows are asked about, −1 the current one.
    """
    every = (_C.QLinear, _C.Embedding, _C.ScatterAdd, _C.RmsNorm, _C.SiluMul, _C.Transform, _C.RopeKV, _C.Attention, _C.Sample, _C.RoundColumns)
    return {op.__name__: op.kernels(device) for op in every}


def threads() -> int:
    return _C.threads()


def set_threads(count: int) -> None:
    """Threads for our kernels and for torch alike."""
    if not 1 <= count <= 1024:
        raise ValueError(f"threads is {count}, expected 1 to 1024")
    _C.set_threads(count)
    torch.set_num_threads(count)


def check(t: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device = CPU) -> Tensor:
    """Refuse a tensor that a kernel would misread. Only the last dimension must be contiguous."""
    if t.dtype != dtype or tuple(t.shape) != shape:
        raise ValueError(f"{name} is {str(t.dtype)[6:]}{list(t.shape)}, expected {str(dtype)[6:]}{list(shape)}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, expected {device}")
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name} has stride {t.stride(-1)} in its last dimension, expected 1")
    return t


def _contiguous(t: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device = CPU) -> Tensor:
    if not check(t, name, dtype, shape, device).is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return t


def check_input(x: Tensor, k: int, device: torch.device) -> None:
    """Refuse an x [..., k] that the linears on a device do not take."""
    if x.shape[-1] != k:
        raise ValueError(f"Linear: x has {x.shape[-1]} features, expected {k}")
    if x.device != device or not x.is_floating_point() or (device.type == "cuda" and x.dtype not in (torch.float16, torch.bfloat16)):
        expected = "float16 or bfloat16" if device.type == "cuda" else "floats"
        raise ValueError(f"Linear: x is {str(x.dtype)[6:]} on {x.device}, expected {expected} on {'the CPU' if device.type == 'cpu' else device}")


def _rows(x: Tensor, k: int) -> Tensor:
    """x [..., k] as the rows that kernels read: f32[m, k] on the CPU; on a GPU in its own dtype, each row beginning at 16 bytes."""
    rows = x if x.dim() == 2 else x.reshape(-1, k)  # torch takes microseconds to do nothing
    if x.device.type == "cuda":
        if rows.stride(0) % 8 or rows.data_ptr() % 16 or rows.stride(1) != 1:
            rows = rows.new_empty(rows.shape[0], (k + 7) // 8 * 8)[:, :k].copy_(rows)
        return rows
    if rows.dtype != float32:
        rows = rows.float()
    return rows if rows.stride(1) == 1 else rows.contiguous()


def linear(
    op: _C.QLinear, x: Tensor, owner: object, device: torch.device = CPU, residual: Tensor | None = None, out: Tensor | None = None,
    codes: tuple[Tensor, Tensor] | None = None, kernel: str = "", program: Program | None = None,
) -> Tensor:  # fmt: skip
    """x [..., k] → [..., n], in x's dtype. `op` is a fresh copy, its weights on `device` and kept alive by `owner`.

    `residual` [m, n] is added; `out` [m, n], which may be the residual, takes the result. Both are f32 on the CPU, of x's dtype on a GPU.
    `codes` of x, as `transform` makes them for the op's act_bits, spare it to make its own; x is then read for outliers and columns alone.
    """
    check_input(x, op.k, device)
    rows = _rows(x, op.k)
    m, n = rows.shape[0], op.n // 2 if op.gated else op.n
    y = rows.new_empty(m, n) if out is None else check(out, "Linear: out", rows.dtype, (m, n), device)
    if residual is not None and op.gated:
        raise ValueError("Linear: a gated result takes no residual")
    if residual is not None and (check(residual, "Linear: residual", rows.dtype, (m, n), device).stride(0) != y.stride(0)):
        raise ValueError("Linear: residual and out must have the same row stride")
    op.m, op.dtype, op.x, op.x_stride = m, DTYPES[rows.dtype], rows.data_ptr(), rows.stride(0)
    op.y, op.y_stride = y.data_ptr(), y.stride(0)
    op.residual = 0 if residual is None else residual.data_ptr()
    if codes is not None:
        op.x_code, op.x_scale = _codes("Linear", codes, op.act_bits, m, op.k, device)
    if m and device.type == "cuda":
        if program is not None:
            raise ValueError("Linear: programs record CPU ops; capture a CUDA graph instead")
        op.run(torch.cuda.current_stream(device).cuda_stream, kernel, device.index)
    elif m:
        go(op, kernel, program, owner, rows, y, residual, codes, memory.workspace(op))
    if out is not None:
        return out
    y = y if x.dim() == 2 else y.view(*x.shape[:-1], n)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _codes(name: str, codes: tuple[Tensor, Tensor], bits: int, m: int, n: int, device: torch.device = CPU) -> tuple[int, int]:
    """Pointers to codes of `bits` 8 i8[m, n], or 4 u8[m, n/2], and their scale f32[m]."""
    if bits not in (4, 8) or bits == 4 and n % 2:
        raise ValueError(f"{name}: codes of {bits} bits for {n} inputs, expected 8, or 4 for an even number")
    dtype, width = (torch.int8, n) if bits == 8 else (uint8, n // 2)
    code = _contiguous(codes[0], f"{name}: codes", dtype, (m, width), device)
    return code.data_ptr(), _contiguous(codes[1], f"{name}: scale", float32, (m,), device).data_ptr()


def embedding(table: _C.QLinear, token: Tensor, out: Tensor, owner: object, kernel: str = "", program: Program | None = None) -> Tensor:
    """Rows token i64[m] of the weights of `table`, whose tensors `owner` keeps alive → out f32[m, k]. Tokens are the caller's to check."""
    m = token.shape[0]
    op = _C.Embedding()
    op.m, op.table = m, table
    op.token = _contiguous(token, "embedding: token", int64, (m,)).data_ptr()
    op.y = _contiguous(out, "embedding: out", float32, (m, table.k)).data_ptr()
    go(op, kernel, program, owner, token, out)
    return out


def scatter_add(x: Tensor, column: Tensor, y: Tensor, kernel: str = "", program: Program | None = None) -> None:
    """y f32[m, l] at column i32[n], each below l and no two the same, += x f32[m, n]."""
    m, n = x.shape
    op = _C.ScatterAdd()
    op.m, op.n, op.y_stride = m, n, y.stride(0)
    op.x = _contiguous(x, "scatter_add: x", float32, (m, n)).data_ptr()
    op.column = _contiguous(column, "scatter_add: column", int32, (n,)).data_ptr()
    op.y = check(y, "scatter_add: y", float32, (m, y.shape[1])).data_ptr()
    go(op, kernel, program, x, column, y)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, row: Tensor | None = None, kernel: str = "", program: Program | None = None
) -> Tensor:
    """x f32[l, n], weight f32[n] → f32[m, n]: all l rows, or those that `row` i64[m] names, which the caller keeps below l."""
    m, n = x.shape[0] if row is None else row.shape[0], x.shape[1]
    out = x.new_empty(m, n) if out is None else out
    op = _C.RmsNorm()
    op.m, op.n, op.eps = m, n, eps
    op.x = _contiguous(x, "rms_norm: x", float32, (x.shape[0], n)).data_ptr()
    op.weight = _contiguous(weight, "rms_norm: weight", float32, (n,)).data_ptr()
    op.y = _contiguous(out, "rms_norm: out", float32, (m, n)).data_ptr()
    op.row = 0 if row is None else _contiguous(row, "rms_norm: row", int64, (m,)).data_ptr()
    go(op, kernel, program, x, weight, row, out)
    return out


def silu_mul(x: Tensor, out: Tensor | None = None, kernel: str = "", program: Program | None = None) -> Tensor:
    """x f32[m, 2n], gate beside up → f32[m, n]."""
    m, n = x.shape[0], x.shape[1] // 2
    out = x.new_empty(m, n) if out is None else out
    op = _C.SiluMul()
    op.m, op.n = m, n
    op.x = _contiguous(x, "silu_mul: x", float32, (m, 2 * n)).data_ptr()
    op.y = _contiguous(out, "silu_mul: out", float32, (m, n)).data_ptr()
    go(op, kernel, program, x, out)
    return out


def round_columns(
    value: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor, coupling: Tensor, limits: tuple[int, int], excess: int,
    mask: Tensor | None = None, base: Tensor | None = None, kernel: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Round the columns of value f32[n, k] in turn to codes within limits, each passing on what that changed: see RoundColumns in csrc/ops.h.

    scale and zero f32[n, groups], group i32[k] below groups, coupling f32[k, k], mask bool[n, k], base f32[n, k] → (codes + excess u8[n, k],
    f32[n, k]: the values as they were when their turn came).
    """
    (n, k), groups, tile, block = value.shape, scale.shape[1], _C.RoundColumns.tile, _C.RoundColumns.block
    if _contiguous(group, "round_columns: group", int32, (k,)).min() < 0 or group.max() >= groups:
        raise ValueError(f"round_columns: group goes from {int(group.min())} to {int(group.max())}, expected 0 to {groups - 1}")

    def tiles(t: Tensor | None, name: str, shape: tuple[int, int], dtype: torch.dtype = float32, fill: float = 0) -> Tensor | None:
        if t is None:
            return None
        padded = torch.nn.functional.pad(check(t, f"round_columns: {name}", dtype, shape), (0, 0, 0, -n % tile), value=fill)
        return padded.view(-1, tile, shape[1]).transpose(1, 2).contiguous()

    held = {
        "value": tiles(value, "value", (n, k)), "scale": tiles(scale, "scale", (n, groups), fill=1.0), "zero": tiles(zero, "zero", (n, groups)),
        "mask": tiles(mask, "mask", (n, k), torch.bool), "base": tiles(base, "base", (n, k)), "group": group,
    }  # fmt: skip
    check(coupling, "round_columns: coupling", float32, (k, k))
    held["coupling"] = torch.nn.functional.pad(coupling, (0, -k % block)).view(k, -1, block).transpose(0, 1).contiguous()
    held["code"] = torch.empty(held["value"].shape, dtype=uint8)
    op = _C.RoundColumns()
    op.n, op.k, op.groups, (op.low, op.high), op.excess = held["value"].shape[0] * tile, k, groups, limits, excess
    for name, t in held.items():
        setattr(op, name, 0 if t is None else t.data_ptr())
    go(op, kernel, None)
    return tuple(held[name].transpose(1, 2).reshape(-1, k)[:n].contiguous() for name in ("code", "value"))


def transform(
    x: Tensor, a: int, b: int, *, left: Tensor | None = None, right: Tensor | None = None, weight: Tensor | None = None, eps: float = 0.0,
    gated: bool = False, exact: bool = False, out: Tensor | None = None, codes: tuple[Tensor, Tensor] | None = None, bits: int = 8,
    clip: Tensor | None = None, kernel: str = "", program: Program | None = None,
) -> Tensor | None:  # fmt: skip
    """leftᵀ · mat(v)[a, b] · right of every token of x f32[m, a·b] → f32[m, a·b]; v is x, RMSNorm(x)·weight, or silu(gate)·up of x f32[m, 2·a·b].

    left f32[a, a], right f32[b, b], weight f32[a·b]. `exact` keeps to f32 where bf16 would be quicker. `codes` (i8[m, a·b] or for 4 bits
    u8[m, a·b/2], scale f32[m]) takes the quantized result, within the ratios clip f32[2]; without `out` nothing else is written then. See
    Transform in csrc/ops.h.
    """
    m, n = x.shape[0], a * b
    if gated and weight is not None:
        raise ValueError("transform: gated and weight exclude each other")
    if not (1 <= a <= 256 and 1 <= b <= 256):
        raise ValueError(f"transform: factors of {a} and {b}, expected 1 to 256")
    op = _C.Transform()
    op.m, op.n, op.a, op.b, op.eps, op.gated, op.bits = m, n, a, b, eps, gated, bits
    op.exact = exact
    op.x, op.x_stride = check(x, "transform: x", float32, (m, 2 * n if gated else n)).data_ptr(), x.stride(0)
    for name, t, shape in (("left", left, (a, a)), ("right", right, (b, b)), ("weight", weight, (n,)), ("clip", clip, (2,))):
        setattr(op, name, 0 if t is None else _contiguous(t, f"transform: {name}", float32, shape).data_ptr())
    if out is None and codes is None:
        out = x.new_empty(m, n)
    if out is not None:
        op.y, op.y_stride = check(out, "transform: out", float32, (m, n)).data_ptr(), out.stride(0)
    if codes is not None:
        op.code, op.scale = _codes("transform", codes, bits, m, n)
    if m:
        go(op, kernel, program, x, left, right, weight, clip, out, codes)
    return out


def _cache(name: str, k: Tensor, v: Tensor, kv_scale: tuple[Tensor, ...] | None) -> _C.KVCache:
    """k, v of one layer: f16[slots, kv_heads, length, head_dim]; i8 with kv_scale, theirs f32[slots, kv_heads, length]; or, for 4 bits,
    u8[slots, kv_heads, length, head_dim/2] with kv_scale (scale of k, of v, zero of k, of v), zeros u8 as the scales."""
    slots, kv_heads, length, width = k.shape
    cache = _C.KVCache()
    cache.bits = 16 if kv_scale is None else 8 if len(kv_scale) == 2 else 4
    per_element = 2 if cache.bits == 4 else 1
    for label, t in (("k cache", k), ("v cache", v)):
        check(t, f"{name}: {label}", KV_DTYPES[cache.bits], (slots, kv_heads, length, width))
        if t.stride(2) != width or t.stride() != k.stride() or t.stride(1) < length * width:
            raise ValueError(f"{name}: {label} must have contiguous heads that do not overlap, laid out as the other one")
    for label, t in zip(("k scale", "v scale", "k zero", "v zero"), kv_scale or ()):
        check(t, f"{name}: {label}", uint8 if label.endswith("zero") else float32, (slots, kv_heads, length))
        if tuple(stride * width for stride in t.stride()) != k.stride()[:3]:
            raise ValueError(f"{name}: {label} must be laid out as the cache, one for every {width * per_element} codes")
    cache.k, cache.v = k.data_ptr(), v.data_ptr()
    cache.slot_stride, cache.head_stride = k.stride(0) * per_element, k.stride(1) * per_element
    for field, t in zip(("k_scale", "v_scale", "k_zero", "v_zero"), kv_scale or ()):
        setattr(cache, field, t.data_ptr())
    return cache


def _head_dim(k: Tensor) -> int:
    """Of a cache whose keys are `k`."""
    return k.shape[3] * (2 if k.dtype == KV_DTYPES[4] else 1)


def _check_rows(name: str, slot: Tensor, position: Tensor, m: int) -> None:
    _contiguous(slot, f"{name}: slot", int32, (m,))
    _contiguous(position, f"{name}: position", int32, (m,))


def rope_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, slot: Tensor, position: Tensor, heads: int,
    kv_scale: tuple[Tensor, ...] | None = None, basis: tuple[Tensor, Tensor] | None = None, clip: tuple[Tensor | None, Tensor | None] = (None, None),
    exact: bool = False, kernel: str = "", program: Program | None = None,
) -> None:  # fmt: skip
    """Turn q of qkv f32[m, (heads + 2·kv_heads)·head_dim] in place; write turned k and v to the cache (see `_cache`) at (slot, position) i32[m].

    cos, sin f32[length, head_dim/2]. `basis` f32[head_dim, head_dim] twice: what q and k of every head are multiplied by after the rotation.
    `clip` f32[2] twice: ratios of k and v for a cache of 4 bits. `exact` keeps to f32 where bf16 would be quicker. The caller
    keeps slots and positions within the cache (`Batch` checks them).
    """
    m, kv_heads, head_dim = qkv.shape[0], k.shape[1], _head_dim(k)
    _check_rows("rope_kv", slot, position, m)
    op = _C.RopeKV()
    op.m, op.heads, op.kv_heads, op.head_dim, op.exact = m, heads, kv_heads, head_dim, exact
    op.qkv = check(qkv, "rope_kv: qkv", float32, (m, (heads + 2 * kv_heads) * head_dim)).data_ptr()
    op.qkv_stride = qkv.stride(0)
    op.cos = _contiguous(cos, "rope_kv: cos", float32, (cos.shape[0], head_dim // 2)).data_ptr()
    op.sin = _contiguous(sin, "rope_kv: sin", float32, (cos.shape[0], head_dim // 2)).data_ptr()
    op.slot, op.position, op.cache = slot.data_ptr(), position.data_ptr(), _cache("rope_kv", k, v, kv_scale)
    for field, t in zip(("q_transform", "k_transform"), basis or ()):
        setattr(op, field, _contiguous(t, f"rope_kv: {field}", float32, (head_dim, head_dim)).data_ptr())
    for field, t in zip(("k_clip", "v_clip"), clip):
        setattr(op, field, 0 if t is None else _contiguous(t, f"rope_kv: {field}", float32, (2,)).data_ptr())
    go(op, kernel, program, qkv, cos, sin, k, v, kv_scale, basis, clip, slot, position)


def attention(
    q: Tensor, k: Tensor, v: Tensor, slot: Tensor, position: Tensor, scale: float, out: Tensor | None = None, exact: bool = False,
    kv_scale: tuple[Tensor, ...] | None = None, kernel: str = "", program: Program | None = None,
) -> Tensor:  # fmt: skip
    """q f32[m, heads·head_dim] over the cache (see `_cache`): row i sees positions 0…position[i] of slot[i] → f32[m, heads·head_dim].

    `exact` keeps to f32 where bf16 would be quicker.
    """
    m, kv_heads, head_dim = q.shape[0], k.shape[1], _head_dim(k)
    heads = q.shape[1] // head_dim
    if heads % kv_heads or heads * head_dim != q.shape[1]:
        raise ValueError(f"attention: q has {q.shape[1]} features, expected a multiple of {kv_heads} heads of {head_dim}")
    _check_rows("attention", slot, position, m)
    out = q.new_empty(m, heads * head_dim) if out is None else out
    op = _C.Attention()
    op.m, op.heads, op.kv_heads, op.head_dim, op.scale, op.exact = m, heads, kv_heads, head_dim, scale, exact
    op.q, op.q_stride = check(q, "attention: q", float32, (m, heads * head_dim)).data_ptr(), q.stride(0)
    op.y, op.y_stride = check(out, "attention: out", float32, (m, heads * head_dim)).data_ptr(), out.stride(0)
    op.slot, op.position, op.cache = slot.data_ptr(), position.data_ptr(), _cache("attention", k, v, kv_scale)
    go(op, kernel, program, q, k, v, kv_scale, slot, position, out, memory.workspace(op))
    return out


def point(op: _C.QLinear, tensors: dict[str, Tensor]) -> None:
    """Sets the op's pointers to tensors that go by its names for them."""
    for name, t in tensors.items():
        setattr(op, name, t.data_ptr())


def pack(op: _C.QLinear, layout: int) -> dict[str, Tensor]:
    """The tensors of a canonical op packed for a layout, by the op's names for them; points the op at them and sets its layout."""
    weight, scale, zero = (memory.packed((size,), uint8) for size in op.packed_bytes(layout))
    op.pack(layout, weight.data_ptr(), scale.data_ptr(), zero.data_ptr())
    tensors = {"weight": weight, "scale": scale} | ({"zero": zero} if op.zero else {})
    if op.outlier_row and layout == MMA:
        lists = [memory.packed((count,), int32) for count in op.outlier_counts()]
        op.pack_outliers(*(t.data_ptr() for t in lists))
        tensors |= dict(zip(("outlier_offset", "outlier_entry"), lists))
    elif op.outlier_row:
        parts = [memory.packed((size,), uint8) for size in op.outlier_band_bytes(layout)]
        op.pack_outlier_bands(layout, *(t.data_ptr() for t in parts))
        tensors |= dict(zip(("outlier_band", "outlier_run", "outlier_vector"), parts))
    if op.columns:
        tensors["column_value"] = memory.packed((2 * op.column_count(layout),), uint8)
        op.pack_columns(layout, tensors["column_value"].data_ptr())
    point(op, tensors)
    op.layout = layout
    return tensors


def unpack(op: _C.QLinear, tensors: dict[str, Tensor], outliers: int) -> dict[str, Tensor]:
    """The inverse of `pack` for the tensors of an op in the CPU's memory; `outliers` says how many it has."""
    op = _C.QLinear(op)
    point(op, tensors)
    groups = (op.n, op.k // op.group)
    back = {"weight": torch.empty(op.n, op.k if op.bits == 8 else (op.k + 1) // 2, dtype=uint8)}
    back["scale"] = torch.empty(groups, dtype=float32 if op.scale_f32 else torch.float16)
    if op.zero:
        back["zero"] = torch.empty(groups, dtype=uint8)
    op.unpack(*(back[name].data_ptr() if name in back else 0 for name in ("weight", "scale", "zero")))
    if op.outlier_offset:
        back["outlier_row"] = torch.empty(op.n + 1, dtype=int32)
        back["outlier_col"] = torch.empty(outliers, dtype=torch.uint16 if op.k <= 65536 else int32)
        back["outlier_value"] = torch.empty(outliers, dtype=torch.float16)
        op.unpack_outliers(*(back[name].data_ptr() for name in ("outlier_row", "outlier_col", "outlier_value")))
    if op.columns:  # f16[n/R][columns][R] beside tiles of R outputs
        value = tensors["column_value"].view(torch.float16).view(-1, op.columns, op.layout)
        back["column_value"] = value.transpose(1, 2).reshape(-1, op.columns)[: op.n].clone()
    return back
