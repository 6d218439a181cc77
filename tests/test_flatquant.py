"""Transforms that change nothing until something is rounded, quantizers against plain loops, training that helps, and the driver end to end."""

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stories import quiet

from pyengine.formats import open_checkpoint
from pyengine.models import llama
from pyengine.quant import affinequant, fakequant, flatquant, training
from pyengine.quant.common import Block, Spec
from pyengine.quant.simulate import Simulation
from pyengine.quant.transforms import CayleyMatrix, DirectMatrix, balanced_pair, flat_rotation, hadamard, kron, random_orthogonal
from pyengine.tokenizer import load_tokenizer

driver = importlib.import_module("pyengine.quantizer")
SPEC = Spec("flatquant", rounding="rtn", grid="range", act_bits=4, kv_bits=4, group_size=0, steps=12)


@pytest.fixture(params=["gqa", "odd"])
def model(request):
    """A random block: grouped heads with biases, or sizes whose factors are uneven, with one odd pair and heads without a Hadamard matrix."""
    sizes = {"gqa": (48, 88, 6, 2, 8), "odd": (45, 86, 3, 3, 10)}[request.param]
    hidden, inner, heads, kv_heads, head_dim = sizes
    c = llama.Config(hidden, inner, 1, heads, 32, kv_heads, head_dim, attention_bias=request.param == "gqa", mlp_bias=request.param == "gqa")
    g = torch.Generator().manual_seed(3)
    weights = {}
    for name in llama.LINEARS:
        n, k = c.linear_shape(name)
        weights[f"{name}.weight"] = torch.randn(n, k, generator=g) / math.sqrt(4 * k)
        if c.has_bias(name):
            weights[f"{name}.bias"] = torch.randn(n, generator=g) / 4
    for name in llama.NORMS:
        weights[f"{name}.weight"] = torch.rand(hidden, generator=g) + 0.5
        weights[f"{name}.weight"][::7] *= 6  # channels that stand out, as in every language model
    x = torch.randn(8, 16, hidden, generator=g)
    rope = llama.rope_table(c, x.shape[1])

    def forward(weights, x, hook=None, edit=None):
        return llama.block_forward(weights, x, c, *rope, hook, edit)

    return Block(0, "model.layers.0.", weights, llama.SITES, forward, None, c), x


def flat_block(model, spec=SPEC, **changes):
    block, x = model
    recipe = dataclasses.replace(flatquant.RECIPE, **changes)
    targets, largest = flatquant.observe(block, x)
    return flatquant.FlatBlock(block, spec, recipe, largest, torch.Generator().manual_seed(0)), targets


def disturb(module, seed=1):
    """Take trained parameters' place: every matrix and scale a little off its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)


def distance(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


# ---- transforms


@pytest.mark.parametrize(("k", "pair"), [(576, (24, 24)), (1536, (32, 48)), (14336, (112, 128)), (172, (43, 4)), (45, (5, 9)), (7, (1, 7))])
def test_balanced_pair(k, pair):
    assert balanced_pair(k) == pair


def test_width_without_small_factors_is_refused():
    with pytest.raises(ValueError, match="1018 inputs have no two factors up to 256.*2 × 509"):
        balanced_pair(1018)


def test_kron_is_the_kronecker_product():
    g = torch.Generator().manual_seed(0)
    left, right, x = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((3, 3), (5, 5), (2, 4, 15)))
    assert torch.allclose(kron(x, left, right), x @ torch.kron(left, right))
    assert torch.allclose(kron(x, left, None), x @ torch.kron(left, torch.eye(5, dtype=torch.float64)))
    assert torch.allclose(kron(x, None, right), x @ torch.kron(torch.eye(3, dtype=torch.float64), right))


def test_hadamard_matrices():
    found = {n for n in range(1, 257) if (h := hadamard(n)) is not None and torch.equal(h @ h.T, n * torch.eye(n).double()) and h.abs().eq(1).all()}
    missing = {52, 92, 100, 116, 156, 172, 184, 188, 232, 236, 244}  # Hadamard matrices of these sizes need other constructions
    assert {1, 2} | set(range(4, 257, 4)) - missing == found


@pytest.mark.parametrize("kind", [DirectMatrix, CayleyMatrix])
@pytest.mark.parametrize("n", [1, 9, 24])
def test_a_matrix_starts_where_told_and_stays_inverse(kind, n):
    start = flat_rotation(n, torch.Generator().manual_seed(0))
    matrix = kind(start)
    assert torch.allclose(matrix()[0].double(), start, atol=1e-6)
    disturb(matrix)
    p, inverse = matrix()
    assert torch.allclose(p @ inverse.mT, torch.eye(n), atol=1e-4) and distance(p.double(), start) > 1e-3
    p.sum().backward()
    assert all(q.grad is not None for q in matrix.parameters())


def test_random_orthogonal():
    q = random_orthogonal(17, torch.Generator().manual_seed(5))
    assert torch.allclose(q @ q.T, torch.eye(17).double(), atol=1e-12)
    assert torch.equal(q, random_orthogonal(17, torch.Generator().manual_seed(5)))


# ---- quantizers


def brute_tokens(row, upper, lower, levels):
    scale = np.float32(max(upper * max(row.max(), 0), lower * max(-row.min(), 0))) / np.float32(levels)
    return [scale * np.clip(np.rint(v / scale), -levels - 1, levels) for v in row]


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_by_brute_force(bits):
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(bits))
    x[1], x[2] = x[1].abs(), -x[2].abs()
    x[3] = 0
    ratio = torch.tensor([0.75, 0.5])
    y = fakequant.quantize_tokens(x, ratio, bits)
    for row, got in zip(x[[0, 1, 2, 4]].numpy(), y[[0, 1, 2, 4]].numpy(), strict=True):
        np.testing.assert_allclose(got, brute_tokens(row, np.float32(0.75), np.float32(0.5), 2 ** (bits - 1) - 1), rtol=1e-6)
    assert bool((y[3] == 0).all()) and bool((y < x.amin()).logical_not().any())


def test_asymmetric_by_brute_force():
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    x[1], x[2], x[3] = x[1].abs(), -x[2].abs(), 0
    y = fakequant.quantize_asymmetric(x, torch.tensor([0.9, 0.8]), 4)
    for row, got in zip(x.numpy(), y.numpy(), strict=True):
        low, high = np.float32(0.8) * min(row.min(), np.float32(0)), np.float32(0.9) * max(row.max(), np.float32(0))
        scale = (high - low) / np.float32(15) or np.float32(1)
        zero = np.rint(-low / scale)
        np.testing.assert_allclose(got, [scale * (np.clip(np.rint(v / scale) + zero, 0, 15) - zero) for v in row], rtol=1e-5, atol=1e-7)


def test_rows_are_clipped_at_both_ends_and_rounded():
    w = torch.randn(4, 2, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2 + 0.4
    clipped = fakequant.clip_rows(w, ratio)
    assert torch.allclose(clipped.amax(-1), ratio[..., 0] * w.amax(-1)) and torch.allclose(clipped.amin(-1), ratio[..., 1] * w.amin(-1))
    scale = clipped.abs().amax(-1, keepdim=True) / 7
    assert torch.allclose(fakequant.quantize_rows(w, ratio, 4), (clipped / scale).round() * scale)


@pytest.mark.parametrize("quantizer", [fakequant.quantize_rows, fakequant.quantize_tokens])
def test_gradients_are_those_of_the_formula(quantizer):
    """Against autograd over the formula written out, with rounding passed through."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(6, 1, 40, generator=g, dtype=torch.float64)
    weight = torch.randn(6, 1, 40, generator=g, dtype=torch.float64)
    rows = quantizer is fakequant.quantize_rows
    ratio = torch.rand(6, 1, 2, generator=g).double() / 2 + 0.4 if rows else torch.tensor([0.7, 0.6]).double()

    def formula(x, ratio):
        high, low = ratio[..., 0:1] * x.amax(-1, keepdim=True), -ratio[..., 1:2] * x.amin(-1, keepdim=True)
        scale = torch.maximum(high, low) / 7
        if rows:
            x = torch.minimum(torch.maximum(x, -low), high)
        exact = x / scale
        return (exact + (exact.round() - exact).detach()).clamp(-8, 7) * scale

    results = []
    for f in (lambda x, ratio: quantizer(x, ratio, 4), formula):
        a, b = x.clone().requires_grad_(), ratio.clone().requires_grad_()
        y = f(a, b)
        results.append((y.detach(), *torch.autograd.grad((y * weight).sum(), (a, b))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


# ---- a block


@pytest.mark.parametrize("kv_bits", [4, 16])
def test_transforms_alone_change_nothing(model, kv_bits):
    flat, targets = flat_block(model, dataclasses.replace(SPEC, kv_bits=kv_bits), clip=False)
    disturb(flat)
    assert distance(flat(model[1], rounded=False), targets) < 1e-4
    assert distance(flat(model[1]), targets) > 0.01
    bases = flat.bases()
    merged = flat.merged(bases, torch.float64, False)
    assert distance(model[0].forward({n: w.float() for n, w in merged.items()}, model[1], None, flat.edit(bases, False)), targets) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"scale": False}, {"clip": False}, {"parametrisation": "cayley"}])
def test_training_lowers_the_error(model, changes):
    """From the identity: the outlier channels are still there to be flattened."""
    flat, targets = flat_block(model, start=lambda n, random: torch.eye(n), **changes)
    before = training.relative_error(flat, model[1], targets)
    groups = [([*flat.matrices.parameters(), *flat.scales.parameters()], 5e-3), ([*flat.ratios.parameters(), *flat.row_ratios.parameters()], 5e-2)]
    errors = training.train(groups, flat, model[1], targets, 25, 4, torch.Generator().manual_seed(0))
    assert training.relative_error(flat, model[1], targets) < 0.97 * before and len(errors) == 25


def test_what_is_stored_computes_what_was_trained(model):
    """Rounded weights, transforms and clips, run as the contract says, against the block with its fake quantizers."""
    flat, targets = flat_block(model)
    disturb(flat)
    with torch.no_grad():
        for p in flat.matrices.parameters():
            p.copy_(p.half())  # as stored
    held = flatquant.stored(flat, lambda: model[1])
    block, x = model
    weights = {f"{name}.weight": held[name].dequantize() for name in block.linears}
    weights |= {f"{name}.bias": held[name].bias.float() for name in block.linears if held[name].bias is not None}
    weights |= {f"{name}.weight": held[f"{name}.weight"] for name in llama.NORMS}

    def edit(what, v):
        if what in ("query", "key"):
            v = v @ held[f"self_attn.{what[0]}_transform"].float()
        elif what != "value":
            right = held.get(f"{what}.right")
            v = kron(v, held[f"{what}.left"].float(), None if right is None else right.float())
            return fakequant.quantize_tokens(v, held[f"{what}.clip"], 4)
        return v if what == "query" else fakequant.quantize_cached(v, held[f"self_attn.{what[0]}_clip"], 4)

    with torch.no_grad():
        same, exact = block.forward(weights, x, None, edit), flat(x)
    trained = flat.merged(flat.bases(), torch.float32, True)
    assert all(distance(weights[name], trained[name]) < 0.03 for name in weights)
    # Scales are float16 in the file, so some entries near the middle of two codes fall to the other side, and others behind them.
    assert distance(same, exact) < 0.6 * distance(exact, targets)


def test_a_width_without_factors_names_the_problem(model):
    block, x = model
    block.weights["mlp.down_proj.weight"] = torch.randn(block.config.hidden_size, 509)
    with pytest.raises(ValueError, match="509 inputs have no two factors"):
        flatquant.FlatBlock(block, SPEC, flatquant.RECIPE, {}, torch.Generator())


# ---- driver


TALE = "Once upon a time there was a little girl who liked to play outside. One day she saw a big red ball. "


def tale_losses(*models):
    """−log p of the tokens of the tale, by each model in plain torch."""
    windows = torch.tensor([load_tokenizer(open_checkpoint(models[0])).encode(TALE)])
    return [Simulation(open_checkpoint(m)).losses(windows) for m in models]


def quantize(stories, out, **options):
    text = out.parent / "text.txt"
    text.write_text(TALE * 40)
    options = {"act_bits": 4, "kv_bits": 4, "samples": 8, "seq_len": 32, "steps": 3, "progress": quiet, "calib": text} | options
    return driver.quantize(stories, out, options.pop("method", "flatquant"), **options)


def test_checkpoint_of_a_real_model(stories, tmp_path):
    done = quantize(stories, tmp_path / "out", steps=6)
    errors = done["statistics"]
    assert len(errors["relative_error_before"]) == 5 and sum(errors["relative_error_after"]) < sum(errors["relative_error_before"])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    squares = dict.fromkeys(("attn_in.left", "attn_in.right", "o_in.left", "mlp_in.right", "self_attn.q_transform", "self_attn.k_transform"), [8, 8])
    shapes = squares | {"down_in.left": [43, 43], "down_in.right": [4, 4]}
    for name, shape in shapes.items():
        t = stored[f"model.layers.3.{name}"]
        assert t.dtype == torch.float16 and list(t.shape) == shape, name
    for name in ("attn_in.clip", "o_in.clip", "mlp_in.clip", "down_in.clip", "self_attn.k_clip", "self_attn.v_clip"):
        t = stored[f"model.layers.3.{name}"]
        assert t.dtype == torch.float32 and t.shape == (2,) and bool(((t > 0.5) & (t < 1)).all()), name
    assert "model.layers.3.o_in.right" not in stored and stored["model.layers.3.mlp.up_proj.scale"].shape == (172, 1)
    exact, rounded = tale_losses(stories, tmp_path / "out")
    assert abs(float(rounded.mean() - exact.mean())) < 0.3


def test_options_decide_what_is_stored(stories, tmp_path):
    quantize(stories, tmp_path / "w4a16", act_bits=16, kv_bits=16, steps=1)
    names = {name.removeprefix("model.layers.0.") for name in load_file(tmp_path / "w4a16" / "model.safetensors")}
    assert "attn_in.left" in names and not any(n.endswith(("clip", "_transform")) for n in names)
    quantize(stories, tmp_path / "grouped", act_bits=16, kv_bits=16, group_size=32, steps=1)
    assert load_file(tmp_path / "grouped" / "model.safetensors")["model.layers.0.mlp.up_proj.scale"].shape == (172, 2)
    quantize(stories, tmp_path / "gptq", rounding="gptq", act_bits=8, steps=6)
    exact, rounded = tale_losses(stories, tmp_path / "gptq")
    assert abs(float(rounded.mean() - exact.mean())) < 0.5
    with pytest.raises(ValueError, match="rounds weights symmetrically"):
        quantize(stories, tmp_path / "no", symmetric=False)


def test_same_seed_same_bytes_also_after_a_crash(stories, tmp_path, monkeypatch):
    quantize(stories, tmp_path / "a")
    real, count = flatquant.quantize_block, 0

    def dies(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(flatquant, "quantize_block", dies)
        with pytest.raises(KeyboardInterrupt):
            quantize(stories, tmp_path / "b")
    done = []
    monkeypatch.setattr(flatquant, "quantize_block", lambda block, *rest: (done.append(block.index), real(block, *rest))[1])
    report = quantize(stories, tmp_path / "b", resume=True)
    assert done == [2, 3, 4] and len(report["statistics"]["relative_error_after"]) == 5
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    monkeypatch.undo()
    quantize(stories, tmp_path / "c", seed=1)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "c" / "model.safetensors").read_bytes()


def test_rotations_without_training(stories, tmp_path):
    quantize(stories, tmp_path / "rtn", method="rtn", samples=None, seq_len=None, steps=None, calib=None)
    quantize(stories, tmp_path / "quarot", method="quarot", samples=None, seq_len=None, steps=None, calib=None)
    stored = load_file(tmp_path / "quarot" / "model.safetensors")
    left = stored["model.layers.1.attn_in.left"].float()
    assert torch.allclose(left @ left.T, torch.eye(8), atol=2e-3) and left.abs().allclose(torch.full((8, 8), 8**-0.5), atol=1e-3)
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(stored[norm], load_file(stories / "model.safetensors")[norm])
    exact, rounded, rotated = tale_losses(stories, tmp_path / "rtn", tmp_path / "quarot")
    assert distance(rotated, exact) < 0.8 * distance(rounded, exact)


def test_no_steps_is_the_start(stories, tmp_path):
    done = quantize(stories, tmp_path / "out", steps=0)["statistics"]
    assert done["relative_error_before"] == done["relative_error_after"]


# ---- AffineQuant


@pytest.mark.parametrize("symmetric", [True, False])
def test_affine_block_is_equivalent_and_learns(model, symmetric):
    block, x = model
    spec = Spec("affinequant", rounding="rtn", grid="range", act_bits=4, kv_bits=4, group_size=0, steps=25, symmetric=symmetric)
    targets, largest = flatquant.observe(block, x)
    affine = affinequant.AffineBlock(block, spec, largest)
    before = training.relative_error(affine, x, targets)
    groups = [([*affine.scales.parameters(), *affine.value.parameters(), affine.pair_scale], 5e-3), (affine.row_ratios.parameters(), 5e-2)]
    training.train(groups, affine, x, targets, 25, 4, torch.Generator().manual_seed(0), lambda step: affine.value.widen(step, 25))
    assert affine.value.band == block.config.head_dim and training.relative_error(affine, x, targets) < 0.97 * before
    disturb(affine)
    with torch.no_grad():
        for p in affine.row_ratios.parameters():
            p.fill_(100.0)  # nothing is clipped
    weights = {name: w.float() for name, w in affine.merged(torch.float64, False).items()}
    assert distance(block.forward(weights, x), targets) < 1e-4
    assert distance(weights["self_attn.v_proj.weight"], block.weights["self_attn.v_proj.weight"]) > 0.01


def test_affine_mask_widens_band_by_band():
    matrices = affinequant.BandedMatrices(2, 5, 0.1)
    disturb(matrices)
    for step, band in ((0, 1), (1, 2), (3, 4), (4, 5)):
        matrices.widen(step, 5)
        a, inverse = matrices()
        assert torch.allclose(a @ inverse.mT, torch.eye(5).expand(2, 5, 5), atol=1e-5)
        apart = (torch.arange(5)[:, None] - torch.arange(5)).abs()
        assert matrices.band == band and torch.equal(a[0] != 0, apart < band)
        assert torch.allclose(a[1][apart == 0], matrices.matrix[1][apart == 0]) and bool((a[1][apart > 0].abs() < 0.05).all())


def test_affinequant_end_to_end(stories, tmp_path):
    done = quantize(stories, tmp_path / "out", method="affinequant", steps=12, symmetric=False)["statistics"]
    assert sum(done["relative_error_after"]) < sum(done["relative_error_before"])
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.zero" in names and not any(n.endswith((".left", ".right", "_transform")) for n in names)
    exact, trained = tale_losses(stories, tmp_path / "out")
    assert float(trained.mean() - exact.mean()) < 1.5
