"""Every row of the dispatch table, forced by name, against the scalar oracle; and the oracle against torch in float64."""

from __future__ import annotations

import pytest
import torch
from weights import MASKS, random_weight

from pyengine import _C, ops
from pyengine.linear import Linear

TOKENS = (1, 2, 3, 7, 16, 17, 64, 257)
# (n, k, group): minimal, odd, no multiple of any tile, one input more than a vector, model-sized; a group of k is a whole row.
SHAPES = ((1, 32, 32), (17, 64, 64), (33, 96, 32), (35, 37, 37), (20, 49, 49), (50, 100, 100), (64, 256, 128), (100, 576, 64), (192, 1536, 128))


def rows(op: str) -> list:
    """The CPU's rows of an op's table but the oracle; those that this machine cannot run are skipped with the reason."""
    return [
        pytest.param(row["name"], marks=pytest.mark.skipif(row["missing"] is not None, reason=str(row["missing"])))
        for row in ops.kernels()[op]
        if row["device"] == "cpu" and not row["name"].endswith("_reference")
    ]


ROPE_ROWS = [row for row in rows("RopeKV") if row.values[0] != "rope_kv_amx"]  # those that need no change of basis (test_rope_amx.py)
FLOAT_ROWS = [row for row in rows("QLinear") if row.values[0] != "qlinear_amx_int8"]  # those that take activations of 16 bits


def bound(kernel: str, act_bits: int = 16) -> float:
    """ops.h: f32 and integer codes, 16-bit fixed point, bf16."""
    return 5e-3 if kernel == "qlinear_amx" else 1e-4 if kernel == "qlinear_avx512" and act_bits == 16 else 1e-5


def takes(kernel: str, m: int = 16, act_bits: int = 16) -> bool:
    """Whether the row is for this many tokens and these bits; test_dispatch.py pins what the others say."""
    if "amx" not in kernel:
        return True
    return m >= 16 and (act_bits < 16) == (kernel == "qlinear_amx_int8")


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("act_bits", (16, 8, 4))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_qlinear_matches_the_oracle(kernel, bits, act_bits, mask):
    if not takes(kernel, act_bits=act_bits):
        return
    clip = torch.tensor([0.9, 0.7]) if act_bits == 4 else None
    for n, k, group in SHAPES:
        for asymmetric in (False, True):
            w = random_weight(n, k, group, bits, asymmetric, mask, bias=asymmetric, scale_f32=n == 33)
            oracle, layer = (Linear(w, act_bits, name, act_clip=clip) for name in ("qlinear_reference", kernel))
            assert layer.kernel_name(16) == kernel
            tokens = [m for m in TOKENS if m * n * k <= 6_000_000 and takes(kernel, m, act_bits)]
            x, residual = torch.randn(tokens[-1], k), torch.randn(tokens[-1], n) * 3
            expected = oracle(x)  # once for all: it is slower than any kernel
            added = expected.double() + residual.double()
            for m in tokens:
                limit = bound(kernel, act_bits) * (1 if m * n >= 64 else 10)  # a few sums may happen to cancel
                assert error(layer(x[:m]), expected[:m]) <= limit, (n, k, group, asymmetric, m)
                assert error(layer(x[:m], residual=residual[:m]), added[:m]) <= limit, (n, k, group, asymmetric, m)


@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_a_gated_result_is_silu_of_the_first_half_times_the_second(kernel):
    for n, k, group, mask in ((64, 96, 32, "sparse"), (70, 100, 100, "full_row"), (192, 4096, 128, "one_tile")):
        w = random_weight(n, k, group, 4, True, mask, bias=True)
        oracle = Linear(w, 16, "qlinear_reference", gated=True)
        if kernel == "qlinear_amx" and n % 32:
            with pytest.raises(RuntimeError, match="halves of whole tiles"):
                Linear(w, 16, kernel, gated=True)
            continue
        layer = Linear(w, 16, kernel, gated=True)
        for m in (1, 3, 7, 16, 50, 300):
            if not takes(kernel, m):
                continue
            x = torch.randn(m, k) / k**0.5
            expected = x.double() @ w.dequantize().double().T + w.bias.double()
            expected = torch.nn.functional.silu(expected[:, : n // 2]) * expected[:, n // 2 :]
            assert error(oracle(x), expected) <= 1e-6
            assert error(layer(x), expected) <= 3 * bound(kernel), (n, k, m)  # silu steepens an error, the product doubles it
    with pytest.raises(ValueError, match="takes no residual"):
        oracle(x, residual=torch.zeros(m, n // 2))
    with pytest.raises(ValueError, match="no halves"):
        Linear(random_weight(5, 64, 32), gated=True)


@pytest.mark.parametrize("act_bits", (16, 8))
@pytest.mark.parametrize("kernel", ["qlinear_reference", *rows("QLinear")])
def test_whole_columns(kernel, act_bits):
    """Beside outliers and alone, first and last input among them, more than a panel of the matrix kernel holds; gated, in any batch."""
    if not takes(kernel, act_bits=act_bits):
        return
    for n, k, group, columns, mask in ((1, 32, 32, 1, "none"), (35, 37, 37, 37, "none"), (100, 576, 64, 12, "sparse"), (40, 4096, 128, 90, "sparse")):
        w = random_weight(n, k, group, 4, True, mask, bias=True, columns=columns)
        layer, plain = Linear(w, act_bits, kernel), Linear(w, act_bits, "qlinear_reference")
        x, residual = torch.randn(18, k), torch.randn(18, n)
        expected = plain(x)
        if act_bits == 16:
            assert error(expected, x.double() @ w.dequantize().double().T + w.bias.double()) <= 1e-6
        for m in (1, 3, 7, 16, 18):
            if not takes(kernel, m, act_bits):
                continue
            limit = bound(kernel, act_bits) * (1 if m * n >= 64 else 10)
            assert error(layer(x[:m]), expected[:m]) <= limit, (n, k, m)
            assert torch.equal(layer(x[:m], residual=residual[:m]), layer(x, residual=residual)[:m]), (n, k, m)
    w = random_weight(64, 96, 32, mask="sparse", columns=3)
    y, expected = (Linear(w, act_bits, name, gated=True)(torch.ones(16, 96) / 9) for name in (kernel, "qlinear_reference"))
    assert error(y, expected) <= 3 * bound(kernel, act_bits)


@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_many_inputs_and_tokens(kernel):
    """More inputs than a panel and more tokens than a chunk of the matrix kernel; outliers at both ends of every part."""
    w = random_weight(40, 4096, 128, mask="sparse", bias=True)
    x, residual = torch.randn(530, w.k), torch.randn(530, w.n)
    expected = x.double() @ w.dequantize().double().T + w.bias.double() + residual.double()
    layer = Linear(w, 16, kernel)
    assert error(layer(x, residual=residual), expected) <= bound(kernel)
    layer(x, residual=residual, out=residual)
    assert error(residual, expected) <= bound(kernel)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_unit_vectors_read_the_weights_back(kernel, bits):
    """On matrix units those nearest in bf16, outliers too: sums of many inputs would hide a rounding towards zero."""
    w = random_weight(40, 416, 32, bits, mask="sparse")
    expected = w.dequantize().bfloat16().float() if kernel == "qlinear_amx" else w.dequantize()
    assert error(Linear(w, 16, kernel)(torch.eye(w.k)), expected.T) <= (0 if kernel == "qlinear_amx" else bound(kernel))


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("mask", MASKS)
def test_the_oracle_matches_torch_in_float64(bits, mask):
    for n, k, group in SHAPES:
        w = random_weight(n, k, group, bits, True, mask, bias=True)
        x, residual = torch.randn(5, k), torch.randn(5, n)
        y = Linear(w, 16, "qlinear_reference")(x, residual=residual)
        expected = x.double() @ w.dequantize().double().T + w.bias.double() + residual.double()
        assert error(y, expected) <= 1e-7


@pytest.mark.parametrize("act_bits", (4, 8))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("kernel", ["qlinear_reference", *rows("QLinear")])
def test_integer_products_are_exact(kernel, bits, act_bits):
    """Scales of 1 and activations that are their own codes leave nothing but the integer sum, which f32 holds up to 2^24."""
    if not takes(kernel, act_bits=act_bits):
        return
    most = (1 << (act_bits - 1)) - 1
    for n, k, group in ((33, 96, 32), (16, 512, 128), (40, 1000, 1000)):
        w = random_weight(n, k, group, bits)
        w.scale = torch.ones_like(w.scale)
        x = torch.randint(-most, most + 1, (17, k)).float()
        x[:, 0] = most  # so that the token's scale is 1
        expected = x.double() @ w.dequantize().double().T
        assert expected.abs().max() < 2**24
        assert torch.equal(Linear(w, act_bits, kernel)(x).double(), expected)


@pytest.mark.parametrize("act_bits", (4, 8))
@pytest.mark.parametrize("kernel", ["qlinear_reference", *rows("QLinear")])
def test_activations_are_clipped_and_rounded_as_ops_h_says(kernel, act_bits):
    if not takes(kernel, act_bits=act_bits):
        return
    w = random_weight(33, 96, 96, mask="sparse")
    dense = w.dequantize()
    outliers = torch.zeros_like(dense)
    outliers[torch.repeat_interleave(torch.arange(w.n), w.outlier_row.diff()), w.outlier_col.long()] = w.outlier_value.float()
    x = torch.randn(17, 96) * torch.logspace(-4, 4, 17)[:, None]
    x[16] = 0
    for clip in (None, torch.tensor([0.6, 0.8]), torch.tensor([1.0, 0.3])):
        high, low = (1.0, 1.0) if clip is None else clip
        q = (1 << (act_bits - 1)) - 1
        scale = torch.maximum(high * x.amax(1).clamp(min=0), low * (-x).amax(1).clamp(min=0)) / q
        code = (x * torch.where(scale > 0, 1 / scale, 0)[:, None]).round().clamp(-q - 1, q)
        assert clip is None or (code == -q - 1).any() or (code == q).sum() > 9
        expected = (code.double() * scale[:, None].double()) @ (dense - outliers).double().T + x.double() @ outliers.double().T
        assert error(Linear(w, act_bits, kernel, act_clip=clip)(x), expected) <= 1e-5, clip
    for bad in ([0.0, 1.0], [1.0, 1.1], [torch.nan, 1.0]):
        with pytest.raises(ValueError, match="act_clip is"):
            Linear(w, act_bits, kernel, act_clip=torch.tensor(bad))


@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_4096_tokens(kernel):
    w = random_weight(40, 64, 32, mask="sparse")
    x = torch.randn(4096, 64)
    assert error(Linear(w, 16, kernel)(x), x.double() @ w.dequantize().double().T) <= bound(kernel)


@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_sums_that_could_overflow_are_left_to_the_oracle(kernel):
    if not takes(kernel, act_bits=8):
        return
    w = random_weight(2, 131072, 131072, bits=8)
    with pytest.raises(RuntimeError, match="may overflow"):
        Linear(w, 8, kernel)
    x = torch.full((1, w.k), 127.0)
    expected = x.double() @ w.dequantize().double().T
    assert error(Linear(w, 8)(x), expected) <= 1e-6


@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_a_large_mean_of_the_activations_costs_no_accuracy(kernel):
    """Codes count from the middle: 128·Σx, taken away from a sum of the same size, would leave three digits."""
    for bits in (4, 8):
        w = random_weight(32, 4096, 4096, bits)
        x = torch.randn(16, w.k) + 100
        assert error(Linear(w, 16, kernel)(x), x.double() @ w.dequantize().double().T) <= bound(kernel), bits


@pytest.mark.parametrize("act_bits", (16, 8))
@pytest.mark.parametrize("kernel", ["qlinear_reference", *rows("QLinear")])
def test_a_token_with_nan_gives_nan_and_its_neighbours_do_not(kernel, act_bits):
    if not takes(kernel, act_bits=act_bits):
        return
    layer = Linear(random_weight(20, 96, 32), act_bits, kernel)
    for value in (torch.nan, torch.inf):
        for column in (0, 50, 95):
            x = torch.randn(16, 96)
            x[1, column] = value
            y = layer(x)
            assert torch.isfinite(y[torch.arange(16) != 1]).all() and not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("kernel", ["attention_reference", *rows("Attention")])
def test_nan_goes_through_attention(kernel):
    k, v = kv(1, 1, 40, 64)
    q = torch.randn(40, 64)
    q[7, 3] = torch.nan
    slot, position = torch.zeros(40, dtype=torch.int32), torch.arange(40, dtype=torch.int32)
    y = ops.attention(q, k, v, slot, position, 0.125, kernel=kernel)
    assert torch.isnan(y[7]).all() and torch.isfinite(y[torch.arange(40) != 7]).all()


@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_what_the_last_op_left_on_the_stack_stays_there(kernel):
    """Inputs up to a whole tile are zeros on both sides: zero times a NaN that lay there would be one."""
    layer, before = Linear(random_weight(32, 33, 33), 16, kernel), ops.threads()
    x = torch.randn(16, 33)
    expected = layer(x)
    nan, rows = torch.full((1, 1, 128, 256), torch.nan).half(), torch.arange(128, dtype=torch.int32)
    try:
        ops.set_threads(1)
        ops.attention(torch.full((128, 4 * 256), torch.nan), nan, nan, torch.zeros_like(rows), rows, 1.0)
        assert torch.equal(layer(x), expected)
    finally:
        ops.set_threads(before)


@pytest.mark.parametrize("act_bits", (16, 8))
@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_a_token_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(kernel, act_bits):
    if not takes(kernel, act_bits=act_bits):
        return
    layer = Linear(random_weight(100, 576, 64, 4, False, "one_tile", bias=True), act_bits, kernel)
    x, before = torch.randn(300, 576), ops.threads()
    whole = layer(x)
    try:
        for count in (1, 2, 3):
            _C.set_threads(count)
            assert torch.equal(layer(x), whole)
            for m in (1, 2, 3, 5, 8, 15, 16, 17, 100):
                assert not takes(kernel, m, act_bits) or torch.equal(layer(x[:m]), whole[:m]), (count, m)
    finally:
        _C.set_threads(before)


@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_qlinear_writes_its_own_columns_only_and_may_add_in_place(kernel):
    w = random_weight(35, 64, 32, 4, False, "sparse", bias=True)
    layer, x = Linear(w, 16, kernel), torch.randn(19, 64)
    for m in (5, 19):
        if not takes(kernel, m):
            continue
        wide = torch.full((m + 4, 50), -0.0)  # adding as little as zero would change its sign
        layer(x[:m], out=wide[:m, 5:40])
        assert torch.equal(wide[:m, 5:40], layer(x[:m]))
        for beside in (wide[:m, :5], wide[:m, 40:], wide[m:]):
            assert (beside == 0).all() and beside.signbit().all()
    residual = torch.randn(19, 35)
    expected = layer(x, residual=residual)
    layer(x, residual=residual, out=residual)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_strided_activations(kernel):
    layer = Linear(random_weight(20, 96, 32, mask="sparse"), 16, kernel)
    x = torch.randn(18, 200)
    assert torch.equal(layer(x[:, 10:106]), layer(x[:, 10:106].contiguous()))


@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_columns_beyond_16_bits(kernel):
    w = random_weight(3, 65536 + 64, 64, 4, False, "last_corner")
    assert w.outlier_col.dtype == torch.int32
    x = torch.randn(17, w.k)
    assert error(Linear(w, 16, kernel)(x), x.double() @ w.dequantize().double().T) <= bound(kernel)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("layout", (1, 8, 16))
def test_packing_has_an_exact_inverse(bits, layout):
    for n, k, group in SHAPES:
        w = random_weight(n, k, group, bits, asymmetric=True)
        layer = Linear(w, 16, "qlinear_reference")  # holds what the op points to
        op = layer._op
        packed = ops.pack(op, layout)
        back = [torch.empty_like(t) for t in (w.weight, w.scale, w.zero)]
        op.unpack(*(t.data_ptr() for t in back))
        assert all(torch.equal(a, b) for a, b in zip(back, (w.weight, w.scale, w.zero)))
        del packed


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", (8, 16))
def test_packed_outliers_are_the_csr_ones(layout, mask):
    """Read back by the description in ops.h."""
    for n, k in ((17, 64), (130, 96), (300, 576), (3, 65536 + 64)):
        w = random_weight(n, k, 32, mask=mask)
        if not w.outliers:
            continue
        layer = Linear(w, 16, "qlinear_reference")  # holds what the op points to
        op = layer._op
        tensors = ops.pack(op, layout)
        index = 4 if k > 65536 else 2
        band = tensors["outlier_band"].numpy().view([("first", "<u4"), ("run", "<u4"), ("runs", "<u4"), ("steps", "u1", 16), ("row", "u1", 128)])
        run = tensors["outlier_run"].numpy().view([("row", "<u4"), ("vectors", "<u4")])
        vector = tensors["outlier_vector"].numpy().view([("col", f"<u{index}", layout), ("value", "<f2", layout)])
        got = torch.zeros(n, k, dtype=torch.float16)
        for b, it in enumerate(band):
            at = int(it["first"])
            for r in run[it["run"] : it["run"] + it["runs"]]:
                for v in vector[at : at + r["vectors"]]:
                    got[b * 128 + int(r["row"]), torch.from_numpy(v["col"].astype("i8"))] = torch.from_numpy(v["value"].copy())
                at += int(r["vectors"])
            for g, steps in enumerate(it["steps"][: 128 // layout].tolist()):
                for v in vector[at : at + steps]:
                    for lane in range(layout):
                        row = b * 128 + int(it["row"][g * layout + lane])
                        if v["value"][lane]:
                            got[row, int(v["col"][lane])] = float(v["value"][lane])
                at += int(steps)
        row_of = torch.repeat_interleave(torch.arange(n), w.outlier_row.diff())
        expected = torch.zeros(n, k, dtype=torch.float16)
        expected[row_of, w.outlier_col.long()] = w.outlier_value
        assert torch.equal(got, expected), (n, k)


@pytest.mark.parametrize("layout", (0, 8, 16))
@pytest.mark.parametrize("bits", (4, 8))
def test_embedding_reads_rows_of_any_layout(bits, layout):
    for n, k, group in SHAPES:
        w = random_weight(n, k, group, bits, n % 2 == 1, "sparse")
        layer = Linear(w, 16, "qlinear_reference")
        packed = ops.pack(layer._op, layout) if layout else None
        token = torch.tensor([n - 1, 0, n // 2] * 7)
        assert torch.equal(layer.rows(token, torch.empty(21, k)), w.dequantize()[token])
        del packed


@pytest.mark.parametrize("mask", MASKS)
def test_the_tile_list_of_outliers_has_an_exact_inverse(mask):
    for n, k, group in (*SHAPES, (70, 8192 + 96, 32), (3, 65536 + 64, 64)):
        w = random_weight(n, k, group, mask=mask)
        if not w.outliers:
            continue
        layer = Linear(w, 16, "qlinear_reference")  # holds what the op points to
        op = layer._op
        offset, entry = (torch.empty(count, dtype=torch.int32) for count in op.outlier_counts())
        op.pack_outliers(offset.data_ptr(), entry.data_ptr())
        tiles = (k + 63) // 64
        assert offset[0] == 0 and offset[-1] == w.outliers and len(offset) == (n + 63) // 64 * 4 * tiles + 1
        owner = torch.repeat_interleave(torch.arange(n), w.outlier_row.diff())
        counted = torch.bincount(owner // 16 * tiles + w.outlier_col.to(torch.int64) // 64, minlength=len(offset) - 1)
        assert torch.equal(offset.diff().long(), counted) and not entry[w.outliers :].any()
        op.outlier_offset, op.outlier_entry = offset.data_ptr(), entry.data_ptr()
        back = [torch.empty_like(t) for t in (w.outlier_row, w.outlier_col, w.outlier_value)]
        op.unpack_outliers(*(t.data_ptr() for t in back))
        assert all(torch.equal(a, b) for a, b in zip(back, (w.outlier_row, w.outlier_col, w.outlier_value)))


@pytest.mark.parametrize("kernel", ["rmsnorm_reference", *rows("RmsNorm")])
def test_rmsnorm(kernel):
    for m in (1, 3, 17, 64):
        for n in (1, 8, 37, 576, 4096):
            x, weight = torch.randn(m, n) * 30, torch.randn(n)
            expected = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
            assert error(ops.rms_norm(x, weight, 1e-5, kernel=kernel), expected) <= 1e-6, (m, n)
            row = torch.tensor([m - 1, 0, m - 1, m // 2])
            assert error(ops.rms_norm(x, weight, 1e-5, row=row, kernel=kernel), expected[row]) <= 1e-6, (m, n)


@pytest.mark.parametrize("kernel", ["silu_mul_reference", *rows("SiluMul")])
def test_silu_mul(kernel):
    for m in (1, 3, 17):
        for n in (1, 8, 37, 1536):
            x = torch.randn(m, 2 * n) * 20
            if n > 1:  # far outside what exp() can return; both ends must stay finite
                x[0, 0], x[-1, n - 1] = 200.0, -200.0
            expected = torch.nn.functional.silu(x.double()[:, :n]) * x.double()[:, n:]
            assert error(ops.silu_mul(x, kernel=kernel), expected) <= 1e-6, (m, n)


@pytest.mark.parametrize("kernel", rows("SiluMul"))
def test_silu_of_negative_gates_has_all_its_digits(kernel):
    """There the result is the exponential itself, where a large gate hides it behind a sigmoid of 1."""
    gate = torch.linspace(-80, -0.5, 1000)[None]
    expected = torch.nn.functional.silu(gate.double())
    y = ops.silu_mul(torch.cat((gate, torch.ones_like(gate)), 1), kernel=kernel)
    assert ((y.double() - expected) / expected).abs().max() <= 1e-6


def kv(slots: int, kv_heads: int, length: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A filled cache; NaN where no position is ever used must not leak into results."""
    return torch.randn(slots, kv_heads, length, head_dim).half(), torch.randn(slots, kv_heads, length, head_dim).half()


@pytest.mark.parametrize("head_dim", (2, 8, 64, 80, 128, 256))
@pytest.mark.parametrize("kernel", ROPE_ROWS)
def test_rope_kv(kernel, head_dim):
    heads, kv_heads, length, m = 6, 2, 40, 9
    cos, sin = torch.randn(length, head_dim // 2), torch.randn(length, head_dim // 2)
    qkv = torch.randn(m, (heads + 2 * kv_heads) * head_dim)
    slot, position = torch.arange(m, dtype=torch.int32) % 3, torch.arange(m, dtype=torch.int32) + 5
    got, expected = [(qkv.clone(), *(t.clone() for t in kv(3, kv_heads, length, head_dim))) for _ in range(2)]
    expected[1].copy_(got[1])
    expected[2].copy_(got[2])
    for (x, k, v), name in ((got, kernel), (expected, "rope_kv_reference")):
        ops.rope_kv(x, cos, sin, k, v, slot, position, heads, kernel=name)
    q = heads * head_dim
    assert error(got[0][:, :q], expected[0][:, :q]) <= 1e-6
    # One rounding to f16 apart at most, where the f32 values differ in their last bit.
    assert error(got[1], expected[1]) <= 1e-4
    assert torch.equal(got[2], expected[2])


def test_the_oracle_of_rope_turns_pairs():
    m, d = 3, 8
    angle = torch.rand(10, d // 2)
    qkv, (k, v) = torch.randn(m, 3 * d), kv(1, 1, 10, d)
    x = qkv.clone()
    slot, position = torch.zeros(m, dtype=torch.int32), torch.tensor([4, 5, 6], dtype=torch.int32)
    ops.rope_kv(x, angle.cos(), angle.sin(), k, v, slot, position, 1, kernel="rope_kv_reference")
    for at, source in ((x[:, :d], qkv[:, :d]), (k[0, 0, 4:7].float(), qkv[:, d : 2 * d])):
        turned = torch.complex(source[:, : d // 2], source[:, d // 2 :]) * torch.polar(torch.ones(m, d // 2), angle[4:7])
        assert torch.allclose(at, torch.cat((turned.real, turned.imag), 1), atol=2e-3)
    assert torch.equal(v[0, 0, 4:7], qkv[:, 2 * d :].half())


def check_attention(kernel: str, k: torch.Tensor, v: torch.Tensor, heads: int, head_dim: int, kv_scale: tuple | None = None) -> None:
    """A kernel against the oracle over a cache of three slots with 590 tokens and more."""
    cases = {
        "first token": [(0, 0)],
        "decode of a batch": [(0, 5), (1, 589), (2, 255), (2, 256), (0, 511), (1, 512)],
        "prefill": [(1, i) for i in range(70)],
        "a chunk of a prefill": [(2, i) for i in range(233, 300)],
        "a mix": [(0, i) for i in range(40)] + [(1, 589), (2, 3), (2, 4)],
        "a slot again": [(0, i) for i in range(30, 60)] + [(0, i) for i in range(20)],
    }
    for name, where in cases.items():
        if kernel == "attention_amx" and (len(where) < 16 or head_dim % 32):
            continue
        slot, position = torch.tensor(where, dtype=torch.int32).T.contiguous()
        q = torch.randn(len(where), heads * head_dim) * 3
        y, expected = (ops.attention(q, k, v, slot, position, head_dim**-0.5, kv_scale=kv_scale, kernel=row) for row in (kernel, "attention_reference"))
        assert error(y, expected) <= (1e-2 if kernel == "attention_amx" else 1e-5), name


@pytest.mark.parametrize("head_dim", (2, 8, 36, 64, 128, 256))
@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (9, 3), (8, 1)))
@pytest.mark.parametrize("kernel", rows("Attention"))
def test_attention_matches_the_oracle(kernel, heads, kv_heads, head_dim):
    k, v = kv(3, kv_heads, 600, head_dim)
    k[:, :, 590:], v[:, :, 590:] = torch.nan, torch.nan  # positions that nobody has reached
    check_attention(kernel, k, v, heads, head_dim)


@pytest.mark.parametrize("kernel", rows("Attention"))
def test_attention_has_the_same_bits_on_any_number_of_threads(kernel):
    k, v = kv(2, 3, 600, 64)
    slot, position = torch.zeros(20, dtype=torch.int32), torch.arange(580, 600, dtype=torch.int32)
    q, before = torch.randn(20, 9 * 64), ops.threads()
    try:
        for m in (1, 20):
            results = []
            for count in (1, 2, 3):
                _C.set_threads(count)
                if kernel != "attention_amx" or m >= 16:
                    results.append(ops.attention(q[:m], k, v, slot[:m], position[:m], 0.125, kernel=kernel))
            assert all(torch.equal(r, results[0]) for r in results)
    finally:
        _C.set_threads(before)


def test_what_a_thread_throws_comes_out_and_the_next_op_runs():
    """The oracle has no room for scores of fewer than no keys."""
    k, v = kv(1, 1, 8, 16)
    q, slot, position = torch.randn(64, 16), torch.zeros(64, dtype=torch.int32), torch.arange(64, dtype=torch.int32) % 8
    broken, before = position.clone(), ops.threads()
    broken[::7] = -2
    try:
        for count in (1, 2, 4):
            ops.set_threads(count)
            expected = ops.attention(q, k, v, slot, position, 1.0, kernel="attention_reference")
            for _ in range(10):
                with pytest.raises(ValueError, match="vector"):
                    ops.attention(q, k, v, slot, broken, 1.0, kernel="attention_reference")
                assert torch.equal(ops.attention(q, k, v, slot, position, 1.0, kernel="attention_reference"), expected)
    finally:
        ops.set_threads(before)


def test_heads_that_overlap_are_refused():
    """The workspace counts a head's keys by the stride of the heads."""
    where, q = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 64)
    for k in (torch.zeros(1, 1, 600, 32).half().expand(1, 2, 600, 32), torch.zeros(1, 600, 1, 32).half().transpose(1, 2)):
        with pytest.raises(ValueError, match="do not overlap"):
            ops.attention(q, k, k, where, where, 1.0)


def test_the_oracle_of_attention_matches_torch():
    k, v = kv(1, 2, 20, 16)
    q = torch.randn(20, 4 * 16)
    rows = torch.arange(20, dtype=torch.int32)
    y = ops.attention(q, k, v, torch.zeros(20, dtype=torch.int32), rows, 0.25, kernel="attention_reference")
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.view(20, 4, 16).transpose(0, 1).double(), k[0].double(), v[0].double(), is_causal=True, scale=0.25, enable_gqa=True
    )
    assert error(y, expected.transpose(0, 1).reshape(20, 64)) <= 1e-6


@pytest.mark.parametrize("kernel", rows("Attention"))
def test_attention_survives_extreme_scores(kernel):
    """Far apart they pick one key each. Every other key has a negative multiple of the query, so that bf16 cannot mistake the winner."""
    q = torch.randn(64, 64).sign() * 200
    position = torch.arange(64, dtype=torch.int32)
    k, v = -q.half().view(1, 1, 64, 64) / 4, torch.randn(1, 1, 64, 64).half()
    k[0, 0, 0] = 0
    y = ops.attention(q, k, v, torch.zeros(64, dtype=torch.int32), position, 1.0, kernel=kernel)
    reference = ops.attention(q, k, v, torch.zeros(64, dtype=torch.int32), position, 1.0, kernel="attention_reference")
    assert error(y, reference) <= (1e-2 if kernel == "attention_amx" else 1e-5)
