"""GPTQ against the closed form it unrolls, the streams it learns from, and rounding as an option of other methods."""

import dataclasses
import importlib

import pytest
import torch
from stories import STORIES, TEXT, contents, crash_at, needs_stories, quiet

from pyengine.formats import open_checkpoint
from pyengine.models import llama
from pyengine.quant import gptq, rounding, rtn
from pyengine.quant.calibration import Batches, FloatModel, stored_weights, untransformed
from pyengine.quant.common import Block, Spec, fit_grid, quantize_matrix
from pyengine.tokenizer import load_tokenizer

driver = importlib.import_module("pyengine.quantizer")
GPTQ, GWQ_GPTQ = {"method": "gptq"}, {"method": "gwq", "rounding": "gptq", "symmetric": False, "bits": 3}


def quantize(out, method="gptq", **options):
    return driver.quantize(STORIES, out, method, **{"samples": 3, "seq_len": 24, "group_size": 32, "progress": quiet} | options)


def correlated(tokens, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, k, generator=g) @ (torch.eye(k) + 0.3 * torch.randn(k, k, generator=g))


def output_error(w, q, h):
    e = (w - q).double()
    return float((e @ h * e).sum())


# ---- the matrix


def closed_form(w, h, scale, zero, spec, mask, order):
    """Each column in turn: round it, then move those still to come to the minimum of the output error, by a fresh inverse. All in f64."""
    w, left = w.double().clone(), order.tolist()
    out = torch.empty_like(w)
    group = w.shape[1] // scale.shape[1]
    while left:
        j = left[0]
        s, z = scale[:, j // group].double(), 0.0 if zero is None else zero[:, j // group].double()
        low, high = (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) if zero is None else (0, 2**spec.bits - 1)
        rounded = s * ((w[:, j] / s).round().add(z).clamp(low, high) - z)
        out[:, j] = torch.where(mask[:, j], w[:, j].half().double(), rounded)
        inverse = torch.linalg.inv(h[left][:, left])
        w[:, left] -= torch.outer((w[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
        left = left[1:]
    return out.float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 32])
def test_matrix_equals_the_closed_form(bits, symmetric, group_size):
    g = torch.Generator().manual_seed(bits)
    w, mask, x = torch.randn(5, 64, generator=g), torch.rand(5, 64, generator=g) < 0.1, correlated(200, 64)
    order = torch.randperm(64, generator=g)
    h = (x.T @ x).double()
    factor = gptq.factorise(h, order)
    spec = Spec(bits=bits, symmetric=symmetric, group_size=group_size, grid="range")
    q = gptq.round_matrix(w, spec, mask, factor, None, "w").check(5)
    damped = h + torch.diag(gptq.DAMPING * h.diagonal().mean().repeat(64))
    want = closed_form(w, damped, *fit_grid(w, bits, group_size or 64, symmetric, mask), spec, mask, order)
    found = q.dequantize()
    assert torch.equal(found[~mask], want[~mask]) and torch.allclose(found[mask], want[mask], atol=2e-3)
    assert q.outliers == int(mask.sum()) and not torch.equal(found[mask], w[mask].half().float())
    assert output_error(w, found, h) < 0.8 * output_error(w, quantize_matrix(w, spec, mask).dequantize(), h)


def test_fewer_tokens_than_inputs_and_inputs_that_are_never_there():
    w, x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), correlated(9, 64)
    x[:, 10:14] = 0
    h = (x.T @ x).double()
    spec = Spec(group_size=32)
    found = gptq.round_matrix(w, spec, None, gptq.factorise(h), None, "w").check(6).dequantize()
    plain = quantize_matrix(w, spec).dequantize()
    assert torch.equal(found[:, 10:14], plain[:, 10:14]) and output_error(w, found, h) < 0.2 * output_error(w, plain, h)
    nothing = gptq.round_matrix(w, spec, None, gptq.factorise(torch.zeros(64, 64, dtype=torch.float64)), None, "w")
    assert torch.equal(nothing.dequantize(), plain)
    h[3, 3] = -1e3  # no such sum exists, but rounding errors of a huge one can look like it
    assert gptq.round_matrix(w, spec, None, gptq.factorise(h), None, "w").check(6)


def test_gram_weighs_the_first_token_of_every_window():
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(2))
    want = sum((gptq.SINK_WEIGHT if t == 0 else 1) * torch.outer(x[s, t], x[s, t]) for s in range(3) for t in range(4))
    assert torch.allclose(gptq.gram([x[:2], x[2:]], gptq.first_token(x)).float(), want, rtol=1e-4, atol=1e-3)


# ---- the streams


@pytest.fixture
def model():
    return FloatModel.of(open_checkpoint(STORIES))


@pytest.fixture
def batches(model, tmp_path):
    ids = torch.tensor(load_tokenizer(model.checkpoint).encode(TEXT)[:96]).view(4, 24)
    return Batches(model, ids, tmp_path, quiet)


@needs_stories
@pytest.mark.usefixtures("float32_products")
def test_statistics_are_those_of_the_quantized_model(model, batches, monkeypatch):
    """Every site's Gram is of what the quantized block before it and the quantized sites before it compute."""
    spec, seen, real = Spec(group_size=32, rounding="gptq", grid="search"), [], gptq.factorise
    first = {n: quantize_matrix(model.block(0)[f"{n}.weight"], spec) for n in llama.LINEARS}
    norms = {f"{n}.weight": model.block(0)[f"{n}.weight"] for n in llama.NORMS}
    finished = {f"model.layers.0.{n}.{key}": t for n, q in first.items() for key, t in q.tensors().items()}
    batches.finished = lambda i: finished | {f"model.layers.0.{n}": t for n, t in norms.items()}
    x = batches.forward(norms | {f"{n}.weight": q.dequantize() for n, q in first.items()}, batches.inputs(0))
    assert torch.equal(batches.quantized_inputs(1), x) and not torch.equal(batches.inputs(1), x)

    monkeypatch.setattr(gptq, "factorise", lambda h: (seen.append(h), real(h))[1])
    block = Block(1, "b.", model.block(1), llama.SITES, batches.forward, batches.folder, quantized_inputs=lambda: batches.quantized_inputs(1))
    done = gptq.quantize_block(block, None, spec)
    final = block.weights | {f"{n}.weight": q.dequantize() for n, q in done.items()}
    inputs = {}
    batches.forward(final, x, inputs.__setitem__)
    for site, h in zip(llama.SITES, seen, strict=True):
        want = gptq.gram([inputs[site]], gptq.first_token(x))
        assert float((h - want).norm() / want.norm()) < 1e-5, site


@needs_stories
def test_bfloat16_tiles_change_the_statistics_little(model, batches, monkeypatch, tmp_path):
    """As on a CPU that has them; torch runs bfloat16 products on any. The float stream stays float32."""
    quantized = {n: quantize_matrix(model.block(0)[f"{n}.weight"], Spec(group_size=32)) for n in llama.LINEARS}
    norms = {f"model.layers.0.{n}.weight": model.block(0)[f"{n}.weight"] for n in llama.NORMS}
    finished = {f"model.layers.0.{n}.{key}": t for n, q in quantized.items() for key, t in q.tensors().items()} | norms
    streams, grams = [], []
    for tiles in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles, raising=False)
        (tmp_path / f"{tiles}").mkdir()
        b = dataclasses.replace(batches, folder=tmp_path / f"{tiles}", finished=lambda i: finished)
        streams.append((b.inputs(1).clone(), b.quantized_inputs(1).clone()))
        block = Block(1, "b.", model.block(1), llama.SITES, b.forward, b.folder)
        grams.append([gptq.gram(rounding.site_inputs(block, block.weights, site, streams[0][1]), torch.ones(4, 24)) for site in llama.SITES])
    assert torch.equal(streams[0][0], streams[1][0])
    assert 0 < float((streams[0][1] - streams[1][1]).norm() / streams[0][1].norm()) < 0.01
    for site, h, near in zip(llama.SITES, *grams, strict=True):
        assert float((h - near).norm() / h.norm()) < 0.01 and (site == "attn_in" or not torch.equal(h, near)), site


@needs_stories
def test_a_transform_is_folded_back_into_the_stream(model):
    g = torch.Generator().manual_seed(3)
    left, right, w = torch.randn(4, 4, generator=g), torch.randn(6, 6, generator=g), torch.randn(5, 24, generator=g)
    x = torch.randn(7, 24, generator=g)
    both = (left.T @ x.view(7, 4, 6) @ right).flatten(1)
    for a, b, want in ((left, right, both), (left, None, (left.T @ x.view(7, 4, 6)).flatten(1)), (None, right, (x.view(7, 4, 6) @ right).flatten(1))):
        assert torch.allclose(x @ untransformed(w, a, b).T, want @ w.T, atol=1e-4)
    weights, spec = model.block(0), Spec(group_size=0, bits=8)
    tensors = {f"model.layers.0.{n}.weight": weights[f"{n}.weight"] for n in llama.NORMS} | {"model.layers.0.o_in.left": torch.eye(8).half() * 2}
    for name in llama.LINEARS:
        w = weights[f"{name}.weight"] / (2 if name == "self_attn.o_proj" else 1)
        tensors |= {f"model.layers.0.{name}.{key}": t for key, t in quantize_matrix(w, spec).tensors().items()}
    stored = stored_weights(model, 0, tensors)
    assert stored.keys() == weights.keys()
    assert all(float((stored[n] - w).norm() / w.norm()) < 0.02 for n, w in weights.items())


# ---- the driver


@needs_stories
@pytest.mark.parametrize(("nth", "options"), [(4, GPTQ), (9, GPTQ), (10, GPTQ), (30, GWQ_GPTQ), (56, GWQ_GPTQ)])
def test_resume_after_a_crash_gives_the_same_bytes(tmp_path, text, monkeypatch, options, nth):
    """The process dies before the nth file gets its name; without a crash two runs give the same bytes."""
    quantize(tmp_path / "whole", calib=text, **options)
    with crash_at(monkeypatch, nth):
        quantize(tmp_path / "out", calib=text, **options)
    assert len(list((tmp_path / "out.partial" / "work").glob("quantized-*.npy"))) <= 2
    quantize(tmp_path / "out", calib=text, resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@needs_stories
def test_a_mask_and_a_rounding_compose(tmp_path, text, model):
    """The same outliers whatever rounds the rest, and GPTQ brings the outputs of a block nearer to the float model's."""
    places, error = {}, {}
    for name in ("rtn", "gptq"):
        quantize(tmp_path / name, "gwq", calib=text, rounding=name, bits=3, symmetric=False, score="abs_g")
        done = open_checkpoint(tmp_path / name)
        tensors = {key: done.get(key) for key in done.names()}
        places[name] = {key: t.tolist() for key, t in tensors.items() if key.endswith(("outlier_row", "outlier_col"))}
        batches = Batches(model, torch.tensor(load_tokenizer(done).encode(TEXT)[:96]).view(4, 24), tmp_path / name, quiet)
        batches.finished = lambda i, t=tensors: t
        error[name] = float((batches.quantized_inputs(5) - batches.inputs(5))[:, 1:].norm())
    assert places["rtn"] == places["gptq"] and places["rtn"]
    assert error["gptq"] < 0.8 * error["rtn"], error


@needs_stories
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gwq", "rounding": "gwq"}, "rounding is 'gwq', expected one of .*gptq.*rtn"),
        ({"method": "gwq", "rounding": "common"}, "rounding is 'common', expected"),
        ({"method": "gptq", "rounding": "rtn"}, "rounding is 'rtn', but gptq is a rounding itself"),
        ({"method": "rtn", "rounding": "gptq"}, "rounding is 'gptq', but rtn is a rounding itself"),
    ],
)
def test_arguments_are_checked(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(tmp_path / "out", calib=text, **options)
    assert not list(tmp_path.glob("out*"))


def test_windows_are_those_of_the_rounding_where_it_reads_text():
    gwq = importlib.import_module("pyengine.quant.gwq")
    wants = gptq.complete(Spec())
    done = gwq.complete(Spec(rounding="gptq"))
    assert (done.samples, done.seq_len, done.outliers) == (wants.samples, wants.seq_len, 0.01)
    assert gwq.complete(Spec(rounding="gptq", score="abs_w")).samples == wants.samples
    assert gwq.complete(Spec(rounding="gptq", samples=3)).samples == 3
    assert rounding.complete(Spec()).samples == 0 and rtn.complete(Spec()).rounding == "rtn"
