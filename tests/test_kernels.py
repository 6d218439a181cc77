"""Every row of the dispatch table, forced by name, against the scalar oracle; and the oracle against torch in float64."""

from __future__ import annotations

import pytest
import torch
from weights import MASKS, random_weight

from pyengine import _C, ops
from pyengine.linear import Linear

TOKENS = (1, 2, 3, 7, 16, 17, 64, 257)
# (n, k, group): minimal, odd, no multiple of any tile, model-sized; a group of k is a whole row.
SHAPES = ((1, 32, 32), (17, 64, 64), (33, 96, 32), (35, 37, 37), (50, 100, 100), (64, 256, 128), (100, 576, 64), (192, 1536, 128))


def rows(op: str) -> list:
    """The CPU's rows of an op's table but the oracle; those that this machine cannot run are skipped with the reason."""
    return [
        pytest.param(row["name"], marks=pytest.mark.skipif(row["missing"] is not None, reason=str(row["missing"])))
        for row in ops.kernels()[op]
        if row["device"] == "cpu" and not row["name"].endswith("_reference")
    ]


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("act_bits", (16, 8))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_qlinear_matches_the_oracle(kernel, bits, act_bits, mask):
    for n, k, group in SHAPES:
        for asymmetric in (False, True):
            w = random_weight(n, k, group, bits, asymmetric, mask, bias=asymmetric, scale_f32=n == 33)
            oracle, layer = Linear(w, act_bits, "qlinear_reference"), Linear(w, act_bits, kernel)
            assert layer.kernel_name() == kernel
            for m in TOKENS:
                if m * n * k > 4_000_000:
                    continue
                x, residual = torch.randn(m, k), torch.randn(m, n) * 3
                assert error(layer(x, residual=residual), oracle(x, residual=residual)) <= 1e-5, (n, k, group, asymmetric, m)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("mask", MASKS)
def test_the_oracle_matches_torch_in_float64(bits, mask):
    for n, k, group in SHAPES:
        w = random_weight(n, k, group, bits, True, mask, bias=True)
        x, residual = torch.randn(5, k), torch.randn(5, n)
        y = Linear(w, 16, "qlinear_reference")(x, residual=residual)
        expected = x.double() @ w.dequantize().double().T + w.bias.double() + residual.double()
        assert error(y, expected) <= 1e-7


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("kernel", ["qlinear_reference", *rows("QLinear")])
def test_integer_products_are_exact(kernel, bits):
    """Scales of 1 and activations that are their own codes leave nothing but the integer sum, which f32 holds up to 2^24."""
    for n, k, group in ((33, 96, 32), (16, 512, 128), (40, 1000, 1000)):
        w = random_weight(n, k, group, bits)
        w.scale = torch.ones_like(w.scale)
        x = torch.randint(-127, 128, (9, k)).float()
        x[:, 0] = 127  # so that the token's scale is 1
        expected = x.double() @ w.dequantize().double().T
        assert expected.abs().max() < 2**24
        assert torch.equal(Linear(w, 8, kernel)(x).double(), expected)


@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_4096_tokens(kernel):
    w = random_weight(40, 64, 32, mask="sparse")
    x = torch.randn(4096, 64)
    assert error(Linear(w, 16, kernel)(x), x.double() @ w.dequantize().double().T) <= 1e-5


@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_sums_that_could_overflow_are_left_to_the_oracle(kernel):
    w = random_weight(2, 131072, 131072, bits=8)
    with pytest.raises(RuntimeError, match="may overflow"):
        Linear(w, 8, kernel)
    x = torch.full((1, w.k), 127.0)
    expected = x.double() @ w.dequantize().double().T
    assert error(Linear(w, 8)(x), expected) <= 1e-6


@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_a_large_mean_of_the_activations_costs_no_accuracy(kernel):
    """Codes count from the middle: 128·Σx, taken away from a sum of the same size, would leave three digits."""
    for bits in (4, 8):
        w = random_weight(32, 4096, 4096, bits)
        x = torch.randn(3, w.k) + 100
        assert error(Linear(w, 16, kernel)(x), x.double() @ w.dequantize().double().T) <= 1e-5, bits


@pytest.mark.parametrize("act_bits", (16, 8))
@pytest.mark.parametrize("kernel", ["qlinear_reference", *rows("QLinear")])
def test_a_token_with_nan_gives_nan_and_its_neighbours_do_not(kernel, act_bits):
    layer = Linear(random_weight(20, 96, 32), act_bits, kernel)
    for value in (torch.nan, torch.inf):
        for column in (0, 50, 95):
            x = torch.randn(3, 96)
            x[1, column] = value
            y = layer(x)
            assert torch.isfinite(y[[0, 2]]).all() and not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("kernel", ["attention_reference", *rows("Attention")])
def test_nan_goes_through_attention(kernel):
    k, v = kv(1, 1, 40, 64)
    q = torch.randn(40, 64)
    q[7, 3] = torch.nan
    slot, position = torch.zeros(40, dtype=torch.int32), torch.arange(40, dtype=torch.int32)
    y = ops.attention(q, k, v, slot, position, 0.125, kernel=kernel)
    assert torch.isnan(y[7]).all() and torch.isfinite(y[torch.arange(40) != 7]).all()


@pytest.mark.parametrize("act_bits", (16, 8))
@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_a_token_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(kernel, act_bits):
    layer = Linear(random_weight(100, 576, 64, 4, False, "one_tile", bias=True), act_bits, kernel)
    x, before = torch.randn(300, 576), ops.threads()
    whole = layer(x)
    try:
        for count in (1, 2, 3):
            _C.set_threads(count)
            assert torch.equal(layer(x), whole)
            for m in (1, 2, 3, 5, 8, 17):
                assert torch.equal(layer(x[:m]), whole[:m]), (count, m)
    finally:
        _C.set_threads(before)


@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_qlinear_writes_its_own_columns_only_and_may_add_in_place(kernel):
    w = random_weight(35, 64, 32, 4, False, "sparse", bias=True)
    layer, x = Linear(w, 16, kernel), torch.randn(9, 64)
    wide = torch.full((9, 50), 7.0)
    layer(x, out=wide[:, 5:40])
    assert torch.equal(wide[:, 5:40], layer(x))
    assert (wide[:, :5] == 7).all() and (wide[:, 40:] == 7).all()
    residual = torch.randn(9, 35)
    expected = layer(x, residual=residual)
    layer(x, residual=residual, out=residual)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_strided_activations(kernel):
    layer = Linear(random_weight(20, 96, 32, mask="sparse"), 16, kernel)
    x = torch.randn(6, 200)
    assert torch.equal(layer(x[:, 10:106]), layer(x[:, 10:106].contiguous()))


@pytest.mark.parametrize("kernel", rows("QLinear"))
def test_columns_beyond_16_bits(kernel):
    w = random_weight(3, 65536 + 64, 64, 4, False, "last_corner")
    assert w.outlier_col.dtype == torch.int32
    x = torch.randn(5, w.k)
    assert error(Linear(w, 16, kernel)(x), x.double() @ w.dequantize().double().T) <= 1e-5


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("layout", (1, 8, 16))
def test_packing_has_an_exact_inverse(bits, layout):
    for n, k, group in SHAPES:
        w = random_weight(n, k, group, bits, asymmetric=True)
        op = Linear(w, 16, "qlinear_reference")._op
        packed = ops.pack(op, layout)
        back = [torch.empty_like(t) for t in (w.weight, w.scale, w.zero)]
        op.unpack(*(t.data_ptr() for t in back))
        assert all(torch.equal(a, b) for a, b in zip(back, (w.weight, w.scale, w.zero)))
        del packed


@pytest.mark.parametrize("mask", MASKS)
def test_the_tile_list_of_outliers_has_an_exact_inverse(mask):
    for n, k, group in (*SHAPES, (70, 8192 + 96, 32), (3, 65536 + 64, 64)):
        w = random_weight(n, k, group, mask=mask)
        if not w.outliers:
            continue
        op = Linear(w, 16, "qlinear_reference")._op
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
@pytest.mark.parametrize("kernel", rows("RopeKV"))
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


@pytest.mark.parametrize("head_dim", (2, 8, 36, 64, 128, 256))
@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (9, 3), (8, 1)))
@pytest.mark.parametrize("kernel", rows("Attention"))
def test_attention_matches_the_oracle(kernel, heads, kv_heads, head_dim):
    length = 150
    k, v = kv(3, kv_heads, length, head_dim)
    k[:, :, 140:], v[:, :, 140:] = torch.nan, torch.nan  # positions that nobody has reached
    cases = {
        "first token": [(0, 0)],
        "decode of a batch": [(0, 5), (1, 139), (2, 64)],
        "prefill": [(1, i) for i in range(70)],
        "a chunk of a prefill": [(2, i) for i in range(33, 100)],
        "a mix": [(0, i) for i in range(40)] + [(1, 100), (2, 3), (2, 4)],
    }
    for name, where in cases.items():
        slot, position = torch.tensor(where, dtype=torch.int32).T.contiguous()
        q = torch.randn(len(where), heads * head_dim) * 3
        y = ops.attention(q, k, v, slot, position, head_dim**-0.5, kernel=kernel)
        expected = ops.attention(q, k, v, slot, position, head_dim**-0.5, kernel="attention_reference")
        assert error(y, expected) <= 1e-5, name


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
    k, v = kv(1, 1, 64, 64)
    q = torch.randn(64, 64) * 2000
    slot, position = torch.zeros(64, dtype=torch.int32), torch.arange(64, dtype=torch.int32)
    y = ops.attention(q, k, v, slot, position, 1.0, kernel=kernel)
    assert error(y, ops.attention(q, k, v, slot, position, 1.0, kernel="attention_reference")) <= 1e-5
