"""BoA, GPFQ, RSQ and the searched grid: each against what it stands for, in another form."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from stories import STORIES, TEXT, contents, needs_stories, quiet
from test_gptq import closed_form, correlated, quantize

from pyengine import ops
from pyengine.formats import open_checkpoint
from pyengine.linear import Linear
from pyengine.models import llama
from pyengine.quant import boa, descent, gpfq, gptq, rounding, rsq
from pyengine.quant.calibration import Batches, FloatModel
from pyengine.quant.common import Block, Spec, assemble, fit_grid, quantize_matrix, round_codes
from pyengine.quant.grid import search_grid
from pyengine.tokenizer import load_tokenizer


@pytest.fixture
def batches(tmp_path):
    model = FloatModel.of(open_checkpoint(STORIES))
    return Batches(model, torch.tensor(load_tokenizer(model.checkpoint).encode(TEXT)[:96]).view(4, 24), tmp_path, quiet)


def block_of(batches, i=2):
    model = batches.model
    rope = batches.cos, batches.sin
    return Block(i, "b.", model.block(i), llama.SITES, batches.forward, None, model.config, rope=rope, quantized_inputs=lambda: batches.inputs(i))


# ---- grid


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_grid_costs_least(bits, symmetric):
    g = torch.Generator().manual_seed(bits)
    w, price, mask = torch.randn(9, 64, generator=g) ** 3, torch.rand(64, generator=g) ** 4, torch.rand(9, 64, generator=g) < 0.05
    w[3, :32], mask[4, 32:] = 0, True
    spec = Spec(bits=bits, symmetric=symmetric)

    def cost(w, scale, zero):
        s, z = (t.float().repeat_interleave(32, 1) for t in (scale, torch.zeros_like(scale) if zero is None else zero))
        least = -(2 ** (bits - 1)) if symmetric else 0
        q = s * ((w / s).round().add(z).clamp(least, least + 2**bits - 1) - z)
        return ((w - q).square() * price * ~mask).unflatten(1, (2, 32)).sum(2)

    found = search_grid(w, spec, 32, mask, price)
    assert found[0].dtype == torch.float16 and bool((found[0] != 0).all()) and (found[1] is None) == symmetric
    plain = fit_grid(w, bits, 32, symmetric, mask)
    assert bool((cost(w, *found) <= cost(w, *plain) + 1e-6).all())
    if bits < 8:
        assert float(cost(w, *found).sum()) < 0.85 * float(cost(w, *plain).sum())
    if symmetric:  # turned around, everything is: the code below -Q goes to the larger side
        turned = search_grid(-w, spec, 32, mask, price)[0]
        assert torch.equal(cost(-w, turned, None), cost(w, *found)) and bool((found[0] < 0).any())
    moved = w.clone()
    moved[mask] = 1e3
    assert torch.equal(search_grid(moved, spec, 32, mask, price)[0], found[0])
    assert search_grid(w * 1e7, spec, 32, mask, price)[0].dtype == torch.float32


@pytest.mark.parametrize(("bits", "act_bits"), [(4, 16), (8, 16), (4, 8), (8, 8), (4, 4)])
def test_every_kernel_takes_negative_scales(bits, act_bits):
    w = torch.randn(70, 128)
    q = quantize_matrix(w, Spec(bits=bits, group_size=32), torch.rand(70, 128) < 0.02)
    x, plain = torch.randn(40, 128), Linear(q, act_bits, "qlinear_reference")
    want, sign = plain(x), torch.where(torch.arange(70) % 2 == 0, -1.0, 1.0)
    values = q.outlier_value * sign.half().repeat_interleave(q.outlier_row.diff())
    turned = replace(q, scale=q.scale * sign.half().unsqueeze(1), outlier_value=values)
    ran = 0
    for name in (r["name"] for r in ops.kernels()["QLinear"] if r["device"] == "cpu" and not r["missing"]):
        for m in (1, 3, 40):
            try:
                found = Linear(turned, act_bits, name)(x[:m])
            except RuntimeError as refused:
                assert name in str(refused)
                continue
            assert float((found * sign - want[:m]).norm() / want[:m].norm()) < 0.005, name
            ran += 1
    assert ran >= 3


# ---- descent


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (2, True), (8, False)])
def test_descent_ends_where_no_single_change_helps(bits, symmetric):
    g = torch.Generator().manual_seed(bits)
    w, mask, x = torch.randn(5, 64, generator=g), torch.rand(5, 64, generator=g) < 0.1, correlated(200, 64)
    x[:, 9] = 0
    h, spec = x.T @ x, Spec(bits=bits, symmetric=symmetric, group_size=32, grid="search")
    scale, zero = fit_grid(w, bits, 32, symmetric, mask)
    codes, values = round_codes(w, scale, zero, bits, spec.container), w

    def stored(scale, codes, values):
        return assemble(values, codes, scale, zero, spec, mask, None, "w").check(5).dequantize()

    def error(*form):
        e = (w - stored(*form)).double()
        return ((e @ h.double()) * e).sum(1)

    errors = [error(scale, codes, values)]
    for _ in range(30):
        codes, values = descent.descend(w, scale, zero, codes, values, spec, mask, h)
        errors.append(error(scale, codes, values))
        assert bool((errors[-1] <= errors[-2] * 1.0001 + 1e-6).all())
    assert float(errors[-1].sum()) < 0.8 * float(errors[0].sum())
    low = 0 if zero is not None else 2 ** (spec.container - 1) - 2 ** (bits - 1)
    high = low + 2**bits - 1
    for j in range(64):
        for step in (-1, 1):
            moved, shifted = codes.clone(), values.clone()
            moved[:, j] = (codes[:, j].int() + step).clamp(low, high).to(torch.uint8)
            shifted[:, j] += 0.01 * step
            assert bool((error(scale, moved, shifted) >= errors[-1] * 0.9999 - 1e-6).all()), j
    better = descent.refit(w, scale, zero, codes, values, spec, mask, h)
    best = error(better, codes, values)
    assert bool((best <= errors[-1] * 1.0001).all()) and float(best.sum()) < 0.99 * float(errors[-1].sum())
    for group in range(2):
        for factor in (0.99, 1.01):
            other = better.clone()
            other[:, group] *= factor
            assert bool((error(other, codes, values) >= best * 0.9999).all())


def test_refit_leaves_a_scale_that_nothing_depends_on():
    w, h = torch.randn(2, 64), torch.zeros(64, 64)
    h[:32, :32] = torch.eye(32)
    spec = Spec(group_size=32)
    scale, _ = fit_grid(w, 4, 32, True)
    found = descent.refit(w, scale, None, round_codes(w, scale, None, 4, 4), w, spec, None, h)
    assert torch.equal(found[:, 1], scale[:, 1]) and not torch.equal(found[:, 0], scale[:, 0])


# ---- GPFQ


def vector_form(w, ours, theirs, scale, zero, spec, mask):
    """The walk itself: u is a vector of as many numbers as there are tokens."""
    group, out = w.shape[1] // scale.shape[1], torch.empty_like(w, dtype=torch.float64)
    low, high = (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) if zero is None else (0, 2**spec.bits - 1)
    for j, row in enumerate(w.double()):
        u = torch.zeros(len(ours), dtype=torch.float64)
        for t in range(w.shape[1]):
            u = u + row[t] * theirs[:, t].double()
            x = ours[:, t].double()
            value = x @ u / (x @ x) if float(x @ x) else row[t]
            s, z = float(scale[j, t // group]), 0 if zero is None else int(zero[j, t // group])
            q = s * float((value / s).round().add(z).clamp(low, high) - z)
            out[j, t] = value.half().double() if mask[j, t] else q
            u = u - out[j, t] * x
    return out.float()


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (2, True), (8, False)])
@pytest.mark.parametrize("tokens", [12, 200])
def test_gram_form_of_gpfq_equals_its_vector_form(bits, symmetric, tokens):
    g = torch.Generator().manual_seed(bits)
    w, mask, theirs = torch.randn(5, 64, generator=g), torch.rand(5, 64, generator=g) < 0.1, correlated(tokens, 64)
    ours = theirs + 0.2 * torch.randn(tokens, 64, generator=g)
    ours[:, 17] = 0
    spec = Spec(bits=bits, symmetric=symmetric, group_size=32, grid="range")
    sums = gpfq.Paths((ours.T.double() @ ours.double()).float(), (ours.T.double() @ theirs.double()).float())
    q = gpfq.round_matrix(w, spec, mask, sums, None, "w").check(5)
    want = vector_form(w, ours, theirs, *fit_grid(w, bits, 32, symmetric, mask), spec, mask)
    found, step = q.dequantize(), q.scale.float().repeat_interleave(32, 1)
    if bits < 8:
        assert float(((found - want).abs() > 0.01 * step).float().mean()) <= 0.01
    path = ((want - found) @ ours.T).norm() / (w @ theirs.T).norm()
    assert float(path) < 0.02, path
    plain = quantize_matrix(w, spec, mask).dequantize()
    error = [float((w @ theirs.T - v @ ours.T).norm()) for v in (found, plain)]
    assert error[0] < 0.9 * error[1], error


@needs_stories
@pytest.mark.usefixtures("float32_products")
def test_gpfq_reads_both_streams(batches):
    block = block_of(batches)
    shifted = batches.inputs(2) + 0.1 * torch.randn(4, 24, 64)
    block.quantized_inputs = lambda: shifted
    found = gpfq.collect(block, block.weights, "mlp_in", lambda: batches.inputs(2), Spec())["mlp.up_proj"]
    ours, theirs = ({}, {})
    batches.forward(block.weights, shifted, ours.__setitem__)
    batches.forward(block.weights, batches.inputs(2), theirs.__setitem__)
    s = gptq.first_token(ours["mlp_in"]).unsqueeze(2)
    for want, got in ((ours, found.gram), (theirs, found.cross)):
        want = ((ours["mlp_in"] * s).flatten(0, 1).T @ want["mlp_in"].flatten(0, 1)).float()
        assert float((got - want).norm() / want.norm()) < 1e-5


# ---- BoA


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_boa_equals_the_closed_form_of_the_whole_hessian(bits, symmetric):
    """Per head, rounding w[d, k] with H_row (x) H_col is rounding one row of d * k weights, in the order of the rows."""
    g = torch.Generator().manual_seed(bits)
    heads, d, k = 2, 4, 32
    w, mask, x = torch.randn(heads * d, k, generator=g), torch.rand(heads * d, k, generator=g) < 0.05, correlated(100, k)
    h, spec = (x.T @ x).double(), Spec(bits=bits, symmetric=symmetric, group_size=32, grid="range")
    rows = [(r.T @ r).double() for r in (correlated(50, d, seed) for seed in (5, 6))]
    statistics = boa.Heads([gptq.factorise(h)], torch.stack([boa.row_factor(r) for r in rows]), heads)
    q = boa.round_matrix(w, spec, mask, statistics, None, "w").check(heads * d)

    def damped(h):
        return h + torch.diag(gptq.DAMPING * h.diagonal().mean().repeat(len(h)))

    scale, zero = fit_grid(w, bits, 32, symmetric, mask)
    order, found = statistics.columns[0].order, q.dequantize()
    for a in range(heads):
        part = slice(a * d, (a + 1) * d)
        flat = [None if t is None else t[part].reshape(1, -1) for t in (scale, zero)]
        sequence = (torch.arange(d)[:, None] * k + order).flatten()
        want = closed_form(w[part].reshape(1, -1), torch.kron(damped(rows[a]), damped(h)), *flat, spec, mask[part].reshape(1, -1), sequence)
        want, kept = want.view(d, k), mask[part]
        assert torch.equal(found[part][~kept], want[~kept]) and torch.allclose(found[part][kept], want[kept], atol=2e-3)


def test_boa_without_a_row_hessian_is_gptq():
    w, x = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)), correlated(100, 64)
    spec, factor = Spec(group_size=32, grid="range"), gptq.factorise((x.T @ x).double())
    want = gptq.round_matrix(w, spec, None, factor, None, "w").dequantize()
    rows = torch.stack([boa.row_factor(torch.eye(4).double())] * 3)
    for statistics in (factor, boa.Heads([factor], rows, 3), boa.Heads([factor] * 3, None, 3)):
        assert torch.equal(boa.round_matrix(w, spec, None, statistics, None, "w").dequantize(), want)


@needs_stories
@pytest.mark.usefixtures("float32_products")
def test_row_hessians_predict_the_error_of_attention_scores(batches):
    """sum over positions and keys of (R_m dq . k)^2, which is what an error dq of a query does, equals dq H_row dq; so with keys."""
    block = block_of(batches)
    c, weights = block.config, block.weights
    (q, k), *_ = rounding.query_key(block, weights, batches.inputs(2))
    seen = {}
    batches.forward(weights, batches.inputs(2), seen.__setitem__)
    h = seen["attn_in"]

    def heads(name):
        return (h @ weights[name + ".weight"].T).unflatten(2, (-1, c.head_dim)).transpose(1, 2)

    assert torch.allclose(q, llama.rotate(heads(boa.QUERY), *block.rope), atol=1e-5)
    assert torch.allclose(k, llama.rotate(heads(boa.KEY), *block.rope), atol=1e-5)
    shared = c.num_attention_heads // c.num_key_value_heads
    dq, dk = torch.randn(q.shape[1], c.head_dim), torch.randn(k.shape[1], c.head_dim)
    positions = h.shape[1]
    error = llama.rotate(dq[:, None].expand(-1, positions, -1), *block.rope)  # R_m dq for every m
    want = (error[None, :, :, None] * k.repeat_interleave(shared, 1)[:, :, None]).sum(4).square().sum((0, 2, 3)) / positions
    key = (k.transpose(2, 3) @ k).double().sum(0).repeat_interleave(shared, 0)
    got = torch.einsum("hi,hij,hj->h", dq.double(), boa.unturned(key, *block.rope), dq.double())
    assert torch.allclose(got.float(), want, rtol=1e-3)
    error = llama.rotate(dk[:, None].expand(-1, positions, -1), *block.rope).repeat_interleave(shared, 0)
    want = (error[None, :, :, None] * q[:, :, None]).sum(4).square().sum((0, 2, 3)).view(-1, shared).sum(1) / positions
    query = (q.transpose(2, 3) @ q).double().sum(0).unflatten(0, (-1, shared)).sum(1)
    got = torch.einsum("hi,hij,hj->h", dk.double(), boa.unturned(query, *block.rope), dk.double())
    assert torch.allclose(got.float(), want, rtol=1e-3)
    found = boa.collect(block, weights, "attn_in", None, Spec())
    for head in range(q.shape[1]):
        want = boa.row_factor(boa.unturned(key, *block.rope)[head])
        assert torch.allclose(found[boa.QUERY].rows[head], want, rtol=1e-3, atol=1e-5)


@needs_stories
@pytest.mark.usefixtures("float32_products")
def test_value_grams_are_of_what_attention_mixes(batches):
    """With them, w G w of a value head's row is the square of what its output adds up to in all heads that read it."""
    block = block_of(batches)
    x, c, seen = batches.inputs(2), block.config, {}
    batches.forward(block.weights, x, seen.__setitem__)
    outputs = seen["o_in"].unflatten(2, (c.num_key_value_heads, -1, c.head_dim))  # [windows, t, value heads, shared, d]
    s = gptq.first_token(x)[:, :, None, None, None]
    want = (s * outputs.square()).sum((0, 1, 3))
    grams = boa.value_grams(block, block.weights, "attn_in")
    w = block.weights[boa.VALUE + ".weight"].double().unflatten(0, (c.num_key_value_heads, -1))
    assert torch.allclose(torch.einsum("hdi,hij,hdj->hd", w, grams, w).float(), want, rtol=1e-3)


# ---- RSQ


@needs_stories
@pytest.mark.usefixtures("float32_products")
def test_attention_mass(batches):
    block = block_of(batches)
    x, c = batches.inputs(2), block.config
    (q, k), *_ = rounding.query_key(block, block.weights, x)
    want = torch.zeros(4, 24)
    for b in range(4):
        for head in range(c.num_attention_heads):
            for i in range(24):
                key = k[b, head // (c.num_attention_heads // c.num_key_value_heads), : i + 1]
                want[b, : i + 1] += torch.softmax(key @ q[b, head, i] / c.head_dim**0.5, 0)
    got = torch.stack(list(rounding.attention(block, block.weights, x))).sum((1, 2))
    assert torch.allclose(got, want, atol=1e-4) and torch.allclose(rsq.attention_mass(block, block.weights, x), want, atol=1e-4)
    mixed = torch.stack(list(rounding.attention(block, block.weights, x)))
    v = F.linear(llama.rms_norm(x, block.weights["input_layernorm.weight"], c.rms_norm_eps), block.weights["self_attn.v_proj.weight"])
    v = v.view(4, 24, -1, c.head_dim).transpose(1, 2).repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 1)
    seen = {}
    batches.forward(block.weights, x, seen.__setitem__)
    assert torch.allclose((mixed @ v).transpose(1, 2).flatten(2), seen["o_in"], atol=1e-4)


def test_token_weights_rank_by_mass_and_count_enough_tokens():
    g = torch.Generator().manual_seed(0)
    mass = torch.rand(3, 50, generator=g) ** 12  # a few tokens have nearly all of it
    mass[:, 0] = 1e4
    w = rsq.token_weights(mass)
    assert (w[:, 0] == gptq.SINK_WEIGHT).all() and torch.allclose(w[:, 1:].mean(1), torch.ones(3))
    rest = w[:, 1:]
    in_order = rest.gather(1, mass[:, 1:].argsort(1))
    assert bool((in_order.diff() >= 0).all())
    assert 0.5 <= float(rest.sum() ** 2 / rest.square().sum()) / rest.numel() < 0.8
    assert torch.equal(rsq.token_weights(torch.ones(2, 5))[:, 1:], torch.ones(2, 4))


# ---- all of them in the driver


@needs_stories
@pytest.mark.parametrize("name", ["gptq", "rsq", "boa", "gpfq"])
def test_every_rounding_is_a_method_and_a_part(tmp_path, text, name):
    """As a method and under GWQ's mask: the block outputs come nearer to the float model's than with rounding to nearest; twice the same bytes."""
    options = {"calib": text, "bits": 3, "symmetric": False}
    quantize(tmp_path / "rtn", "rtn", bits=3, symmetric=False)
    quantize(tmp_path / "alone", name, **options)
    quantize(tmp_path / "gwq", "gwq", rounding=name, score="hdiag_dw2", **options)
    quantize(tmp_path / "again", "gwq", rounding=name, score="hdiag_dw2", **options)
    assert contents(tmp_path / "gwq") == contents(tmp_path / "again")
    model, error = FloatModel.of(open_checkpoint(STORIES)), {}
    for form in ("rtn", "alone", "gwq"):
        done = open_checkpoint(tmp_path / form)
        tensors = {key: done.get(key) for key in done.names()}
        ids = torch.tensor(load_tokenizer(done).encode(TEXT)[:96]).view(4, 24)
        streams = Batches(model, ids, tmp_path / form, quiet, lambda i, t=tensors: t)
        error[form] = float((streams.quantized_inputs(5) - streams.inputs(5))[:, 1:].norm())
    assert torch.is_grad_enabled()
    assert max(error["alone"], error["gwq"]) < 0.8 * error["rtn"] and any(key.endswith("outlier_value") for key in tensors), error
