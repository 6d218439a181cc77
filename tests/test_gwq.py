"""GWQ: its gradients against autograd over the whole model, its statistics by hand, and that it does what it is for."""

import dataclasses
import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from stories import STORIES, needs_stories, quiet

from pyengine.formats import open_checkpoint
from pyengine.models import llama
from pyengine.quant import gwq, rounding, rtn
from pyengine.quant.calibration import Batches, FloatModel, sample_text
from pyengine.quant.common import Block, Spec, rounding_error, top_mask
from pyengine.quant.outliers import choose, mask_of
from pyengine.tokenizer import load_tokenizer

pytestmark = needs_stories
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. "
    "She wanted to play with it, but it was too high. Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know "
    "what to do. She said, \"I want to play with your ball, but I can't find it.\" Lily was sad and went home with her mom. "
)


@pytest.fixture
def model():
    return FloatModel.of(open_checkpoint(STORIES))


@pytest.fixture
def batches(model, tmp_path):
    tokens = load_tokenizer(model.checkpoint).encode(STORY)
    ids = torch.tensor(tokens[:120]).view(3, 40)
    return Batches(model, ids, tmp_path, quiet)


def block(model, batches, i):
    return Block(i, f"model.layers.{i}.", model.block(i), llama.SITES, batches.forward, batches.folder)


def reference_gradients(ids):
    """Per sample: gradients of the mean next-token cross-entropy by tensor name, through transformers' model at once."""
    transformers = pytest.importorskip("transformers")
    config = json.loads((STORIES / "config.json").read_text())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    model.load_state_dict(load_file(STORIES / "model.safetensors"), strict=False)
    for sample in ids:
        model.zero_grad()
        loss = F.cross_entropy(model(sample[None]).logits[0, :-1], sample[1:])
        loss.backward()
        yield loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def close(a, b):
    return float((a - b).norm() / b.norm()) < 1e-4


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("score", ["abs_g", "sq_g"])
def test_walk_equals_autograd_over_the_whole_model(model, batches, monkeypatch, score):
    monkeypatch.setattr(gwq, "HEAD_TOKENS", 16)  # several chunks, the last one ragged
    losses, gradient = gwq.loss_gradient(model, batches)
    reference = list(reference_gradients(batches.ids))
    assert torch.allclose(losses, torch.tensor([loss for loss, _ in reference]), atol=1e-4)
    for i in range(model.blocks - 1, -1, -1):
        found = gwq.block_statistics(batches, model.block(i), llama.LINEARS, batches.inputs(i), gradient, score)
        for name, statistic in found.items():
            grads = [g[f"model.layers.{i}.{name}.weight"] for _, g in reference]
            assert close(statistic, sum(g.abs() if score == "abs_g" else g**2 for g in grads)), (i, name)


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("score", ["abs_g", "sq_g", "abs_g_dw", "fisher_dw2"])
def test_prepare_leaves_the_masks_of_these_gradients(model, batches, score):
    spec = Spec(group_size=32, score=score, scope="tensor", rounding="rtn")
    stats = gwq.prepare(model, batches, spec)
    reference = list(reference_gradients(batches.ids))
    assert stats["calibration_loss"] == pytest.approx(sum(loss for loss, _ in reference) / 3, abs=1e-4)
    for i in (0, 4):
        quantized = gwq.quantize_block(block(model, batches, i), None, spec)
        for name, q in quantized.items():
            w = model.block(i)[f"{name}.weight"]
            grads = torch.stack([g[f"model.layers.{i}.{name}.weight"] for _, g in reference])
            error = rounding_error(w, spec)
            want = {
                "abs_g": grads.abs().sum(0),
                "sq_g": grads.square().sum(0),
                "abs_g_dw": grads.abs().sum(0) * error.abs(),
                "fisher_dw2": grads.square().sum(0) * error**2,
            }[score]
            mask = torch.zeros_like(w, dtype=torch.bool)
            mask[torch.repeat_interleave(torch.arange(q.n), q.outlier_row.diff()), q.outlier_col.long()] = True
            differ = int((mask != top_mask(want, 0.01)).sum())
            assert int(mask.sum()) == int(0.01 * w.numel()) and differ <= 2, (i, name)  # 2: two scores equal to float32
    assert sorted(f.name for f in batches.folder.glob("gradient*")) == ["gradient-00000.npy"]


@pytest.mark.parametrize("name", ["gptq", "boa", "flexround"])
def test_scores_price_what_the_rounding_changes(model, batches, monkeypatch, name):
    """By GPTQ and its kin the errors are their own, but for what comes after the last column; FlexRound, which would learn the block twice, is stood in for by rounding to nearest."""
    spec = gwq.complete(Spec(group_size=32, scope="tensor", rounding=name, outliers=0.02, samples=3, seq_len=40, steps=1))
    monkeypatch.setattr(gwq, "DRAFT_SAMPLES", 2)
    gwq.prepare(model, batches, spec)
    i, first = model.blocks - 1, gwq.gradient_batches(batches, spec)
    b = dataclasses.replace(block(model, first, i), config=model.config, rope=(first.cos, first.sin), quantized_inputs=lambda: first.inputs(i)[:2])
    found = gwq.block_statistics(first, model.block(i), llama.LINEARS, first.inputs(i), gwq.loss_gradient(model, first)[1], spec.score)
    rounded = rounding.round_block(b, None, spec, draft=True) if name != "flexround" else {}
    for linear in llama.LINEARS:
        w = b.weights[f"{linear}.weight"]
        error = w - rounded[linear].dequantize() if rounded else rounding_error(w, spec)
        kept = mask_of(gwq.load(gwq._kept_file(batches.folder, i, linear)), w.shape, spec)
        assert torch.equal(kept, top_mask(found[linear] * error**2, 0.02)), linear
        assert not rounded or not torch.equal(kept, top_mask(found[linear] * rounding_error(w, spec) ** 2, 0.02))


@pytest.mark.parametrize("scope", ["global", "row", "columns"])
def test_scopes_look_at_the_same_scores(model, batches, scope):
    """Each against the scores themselves, which a walk by the library's parts gives."""
    spec = gwq.complete(Spec(group_size=32, score="fisher_dw2", scope=scope, outliers=0.03, rounding="rtn"))
    gwq.prepare(model, batches, spec)
    _, gradient = gwq.loss_gradient(model, batches)
    scores = {}
    for i in range(model.blocks - 1, -1, -1):
        weights = model.block(i)
        found = gwq.block_statistics(batches, weights, llama.LINEARS, batches.inputs(i), gradient, spec.score)
        scores[i] = {name: found[name] * rounding_error(weights[f"{name}.weight"].detach(), spec).square() for name in llama.LINEARS}
    every = torch.cat([scores[i][name].flatten() for i in range(model.blocks) for name in llama.LINEARS])
    least = every.sort(descending=True).values[int(0.03 * len(every)) - 1]
    total = 0
    for i in range(model.blocks):
        for name, q in gwq.quantize_block(block(model, batches, i), None, spec).items():
            score = scores[i][name]
            mask = torch.zeros_like(score, dtype=torch.bool)
            if scope == "columns":
                assert q.outliers == 0 and torch.equal(q.column_index.long(), choose(scores[i], llama.SITES, spec)[name])
                continue
            mask[torch.repeat_interleave(torch.arange(q.n), q.outlier_row.diff()), q.outlier_col.long()] = True
            total += q.outliers
            if scope == "global":
                assert torch.equal(mask, score >= least)
            else:
                assert mask.sum(1).eq(round(0.03 * q.k)).all() and bool((score[mask].min() >= 0))
    assert scope != "global" or total == int(0.03 * len(every))
    with pytest.raises(ValueError, match="does not compare across matrices"):
        gwq.complete(Spec(score="hdiag_dw2", scope="global"))
    assert gwq.complete(Spec(scope="columns")).score == "hdiag_dw2"
    assert [gwq.complete(Spec(score=s)).scope for s in (None, "sq_g", "hdiag_dw2", "abs_w")] == ["global", "global", "tensor", "tensor"]


@pytest.mark.parametrize("score", ["abs_g", "sq_g"])
def test_gradients_that_cancel_over_samples_still_count(model, batches, score):
    """The same window twice with opposite output gradients: summed first, nothing would be left."""
    inputs = batches.inputs(2)[:1].repeat(2, 1, 1)
    gradient = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    both = torch.cat((gradient, -gradient))
    found = gwq.block_statistics(batches, model.block(2), llama.LINEARS, inputs, both, score)
    once = gwq.block_statistics(batches, model.block(2), llama.LINEARS, inputs[:1], gradient, score)
    for name in llama.LINEARS:
        assert float(once[name].max()) > 0 and close(found[name], 2 * once[name])


def test_hdiag_is_the_inputs_without_the_first_token(model, batches):
    b = block(model, batches, 1)
    seen = {}
    batches.forward(b.weights, batches.inputs(1), lambda site, x: seen.__setitem__(site, x))
    found = gwq.input_squares(b, batches.inputs(1))
    for site, names in llama.SITES.items():
        for name in names:
            assert close(found[name], seen[site][:, 1:].square().sum((0, 1)))
    spec = Spec(group_size=32, score="hdiag_dw2", scope="tensor", rounding="rtn")
    q = gwq.quantize_block(b, lambda: batches.inputs(1), spec)["mlp.down_proj"]
    w = b.weights["mlp.down_proj.weight"]
    mask = top_mask(found["mlp.down_proj"] * rounding_error(w, spec) ** 2, 0.01)
    assert q.outliers == int(mask.sum()) and torch.equal(q.dequantize()[mask], w[mask].half().float())


def test_rounding_error_is_what_the_format_loses(model, batches):
    for spec in (Spec(group_size=32), Spec(group_size=0, bits=3, symmetric=False), Spec(bits=2), Spec(bits=8, symmetric=False)):
        b = block(model, batches, 0)
        for name, q in rtn.quantize_block(b, None, spec).items():
            w = b.weights[f"{name}.weight"]
            assert torch.equal(rounding_error(w, spec), w - q.dequantize())


def test_completed_requests():
    paper = importlib.import_module("pyengine.quant.gwq_paper")
    done = gwq.complete(Spec(seq_len=100))
    assert (done.score, done.rounding, done.samples, done.seq_len) == ("fisher_dw2", "gptq", 32, 100)
    done = gwq.complete(Spec(rounding="rtn", seq_len=100))
    assert (done.score, done.samples, done.seq_len) == ("fisher_dw2", 16, 100)
    assert gwq.complete(Spec(score="abs_w")).samples == 0
    done = paper.complete(Spec(samples=9, method="gwq-paper"))
    assert (done.score, done.samples, paper.prepare) == ("abs_g", 1, gwq.prepare)
    assert rtn.complete(Spec()) == dataclasses.replace(Spec(), outliers=0.0, score=None, rounding="rtn", grid="range", samples=0, seq_len=0)


def test_outliers_bring_the_loss_back(model, batches):
    """The loss that rounding costs falls by more than a quarter (0.65 of it is left; 0.82 if the least sensitive weights are kept)."""
    windows = sample_text(model.checkpoint, load_tokenizer(model.checkpoint), 8, 100, 7, quiet)
    batches = Batches(model, sample_text(model.checkpoint, load_tokenizer(model.checkpoint), 8, 100, 8, quiet), batches.folder, quiet)
    spec = gwq.complete(Spec(group_size=64, outliers=0.05, rounding="rtn"))
    gwq.prepare(model, batches, spec)
    loss = {}
    for method in (None, rtn, gwq):
        x = model.embedding()[windows]
        for i in range(model.blocks):
            b = block(model, batches, i)
            if method:
                b.weights |= {f"{name}.weight": q.dequantize() for name, q in method.quantize_block(b, None, spec).items()}
            x = batches.forward(b.weights, x)
        logits = llama.rms_norm(x, model.final_norm(), model.config.rms_norm_eps) @ model.head().T
        loss[method] = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))
    assert loss[gwq] - loss[None] < 0.75 * (loss[rtn] - loss[None]), loss
