"""Methods that scale the inputs of a site: the merged block computes the same, and each scale is what its paper says."""

from types import SimpleNamespace

import pytest
import torch
from stories import STORIES, needs_stories, quiet

from pyengine.formats import open_checkpoint
from pyengine.loader import load
from pyengine.models import llama
from pyengine.quant import awq, merge, rtn, smoothquant
from pyengine.quant.calibration import Batches, FloatModel
from pyengine.quant.common import Block, Spec
from pyengine.quant.outliers import choose, mask_of
from pyengine.quantizer import quantize

pytestmark = needs_stories


@pytest.fixture
def block(tmp_path):
    """Block 2 of a model with 8 query and 4 key heads, every linear with a bias."""
    model = FloatModel.of(open_checkpoint(STORIES))
    batches = Batches(model, torch.randint(3, 500, (4, 40)), tmp_path, quiet)
    weights = model.block(2)
    for name in llama.LINEARS:
        weights[f"{name}.bias"] = torch.randn(weights[f"{name}.weight"].shape[0]) / 5
    block = Block(2, "model.layers.2.", weights, llama.SITES, batches.forward, tmp_path, model.config)
    block.x = batches.inputs(2)
    return block


def error(y, expected):
    return float((y - expected).norm() / expected.norm())


@pytest.mark.parametrize("sites", [*((site,) for site in llama.SITES), tuple(llama.SITES)])
def test_a_merged_block_computes_the_same(block, sites):
    weights = dict(block.weights)
    for site in sites:
        k = weights[f"{block.sites[site][0]}.weight"].shape[1]
        s = merge.shared(site, torch.rand(k) * 10 + 0.1, block.config)
        merge.scale_inputs(weights, site, block.sites[site], s, block.config)
    for name in block.sites[sites[0]]:
        assert error(weights[f"{name}.weight"], block.weights[f"{name}.weight"]) > 0.5
    assert error(block.forward(weights, block.x), block.forward(block.weights, block.x)) < 1e-5


def test_query_heads_of_a_group_share_their_scales():
    config = SimpleNamespace(num_key_value_heads=2, head_dim=2)
    assert merge.shared("o_in", torch.tensor([1.0, 2, 3, 6, 10, 20, 30, 40]), config).tolist() == [2, 4, 2, 4, 20, 30, 20, 30]
    assert merge.shared("attn_in", torch.tensor([1.0, 2, 3]), config).tolist() == [1, 2, 3]


def planted(block):
    """Makes some inputs of the norms' sites 40 times as large."""
    for norm in llama.NORMS:
        block.weights[f"{norm}.weight"] = block.weights[f"{norm}.weight"].clone()
        block.weights[f"{norm}.weight"][5:8] *= 40
    return block


def test_awq_finds_the_least_output_error_of_its_grid(block):
    spec, x = awq.complete(Spec(bits=3, group_size=32, outliers=0.0)), {}
    planted(block).forward(block.weights, block.x, x.__setitem__)
    for site, seen in awq.site_inputs(block, block.x).items():
        assert error(seen.magnitude, x[site][:, 1:].abs().mean((0, 1))) < 1e-5
        weights = [block.weights[f"{name}.weight"] for name in block.sites[site]]
        magnitude, specs = merge.shared(site, seen.magnitude, block.config), [spec] * len(weights)
        alpha, s = awq.search(weights, specs, seen, magnitude)
        tokens = x[site].flatten(0, 1)
        direct = sum(  # by running it
            float(((tokens / s) @ (w * s - awq.rounding_error(w * s, spec)).T - tokens @ w.T).square().sum()) for w in weights
        )
        assert awq.output_error(weights, specs, s, seen.gram) == pytest.approx(direct, rel=1e-3)
        plain = awq.output_error(weights, specs, torch.ones_like(s), seen.gram)
        assert direct < plain * 1.001 and (site not in merge.NORMS or alpha > 0 and direct < 0.7 * plain), (site, alpha, direct / plain)


def test_awq_without_scales_is_rounding_to_nearest(block, monkeypatch):
    monkeypatch.setattr(awq, "STEPS_OF_ALPHA", 1)
    spec = awq.complete(Spec(group_size=32, outliers=0.0))
    found, expected = awq.quantize_block(block, lambda: block.x, spec), rtn.quantize_block(block, None, spec)
    assert found.keys() == expected.keys()
    for name, q in expected.items():
        assert all(torch.equal(t, found[name].tensors()[key]) for key, t in q.tensors().items())


def dequantized(block, found):
    weights = dict(block.weights)
    for name, q in found.items():
        weights |= {name: q} if isinstance(q, torch.Tensor) else {f"{name}.weight": q.dequantize(), f"{name}.bias": q.bias.float()}
    return weights


def test_a_block_loses_less_with_awq(block):
    spec = awq.complete(Spec(bits=3, group_size=32, outliers=0.0))
    expected = planted(block).forward(block.weights, block.x)
    loss = {m: error(block.forward(dequantized(block, m.quantize_block(block, lambda: block.x, spec)), block.x), expected) for m in (rtn, awq)}
    assert loss[awq] < 0.9 * loss[rtn], loss


@pytest.mark.parametrize("scope", [None, "row", "columns"])
def test_awq_keeps_what_costs_most_in_the_scaled_block(block, scope):
    spec = awq.complete(Spec(bits=3, group_size=32, outliers=0.05, scope=scope))
    planted(block)
    found, plain = (awq.quantize_block(block, lambda: block.x, s) for s in (spec, awq.complete(Spec(bits=3, group_size=32, outliers=0.0))))
    weights, seen = dict(block.weights) | {name: q for name, q in found.items() if isinstance(q, torch.Tensor)}, {}
    block.forward(block.weights, block.x, seen.__setitem__)
    for site in merge.NORMS:
        s = block.weights[f"{merge.NORMS[site]}.weight"] / weights[f"{merge.NORMS[site]}.weight"]
        squares, scores = (seen[site][:, 1:] / s).square().sum((0, 1)), {}
        for name in block.sites[site]:
            scores[name] = squares * awq.rounding_error(block.weights[f"{name}.weight"] * s, spec).square()
        for name, kept in choose(scores, {site: block.sites[site]}, spec).items():
            q, mask = found[name], torch.zeros_like(scores[name], dtype=torch.bool)
            if q.columns:
                mask[:, q.column_index.long()] = True
            else:
                mask[torch.repeat_interleave(torch.arange(q.n), q.outlier_row.diff()), q.outlier_col.long()] = True
            assert int((mask != mask_of(kept, mask.shape, spec)).sum()) <= 2, (name, scope)  # two scores equal to float32
    expected = block.forward(block.weights, block.x)
    kept, rounded = (error(block.forward(dequantized(block, f), block.x), expected) for f in (found, plain))
    assert kept < 0.9 * rounded
    for wrong in ({"score": "fisher_dw2"}, {"scope": "global"}):
        with pytest.raises(ValueError, match="awq ranks outliers by hdiag_dw2"):
            awq.complete(Spec(**wrong))


def rounded_activations(block, weights, bits):
    """The block's output with the input of every site rounded to `bits`, one scale a token."""

    def edit(what, x):
        if what not in llama.SITES:
            return x
        scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        return torch.round(x / scale) * scale

    return block.forward(weights, block.x, None, edit)


def test_smoothquant_scales_as_the_paper_and_helps_rounded_activations(block):
    spec = smoothquant.complete(Spec(bits=8, act_bits=8, group_size=0))
    expected = planted(block).forward(block.weights, block.x)
    found = smoothquant.quantize_block(block, lambda: block.x, spec)
    x = {}
    block.forward(block.weights, block.x, x.__setitem__)
    for site, norm in merge.NORMS.items():
        w = torch.cat([block.weights[f"{name}.weight"] for name in block.sites[site]])
        s = (x[site].abs().amax((0, 1)) / w.abs().amax(0)).sqrt()
        assert error(found[f"{norm}.weight"], block.weights[f"{norm}.weight"] / s) < 1e-5
    smooth = error(rounded_activations(block, dequantized(block, found), 8), expected)
    plain = error(rounded_activations(block, dequantized(block, rtn.quantize_block(block, None, spec)), 8), expected)
    assert smooth < 0.7 * plain, (smooth, plain)
    with pytest.raises(ValueError, match="act_bits is 16"):
        smoothquant.complete(Spec())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"group_size": 32}),
        ("awq", {"rounding": "gptq", "outliers": 0.01, "scope": "columns"}),
        ("smoothquant", {"bits": 8, "act_bits": 8}),
    ],
)
def test_checkpoints_load_and_run(tmp_path, method, options):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who liked to play outside. One day she saw a big red ball. " * 10)
    done = quantize(STORIES, tmp_path / "out", method, calib=text, samples=2, seq_len=24, progress=quiet, **options)
    assert (done["outlier_share"] > 0) == ("outliers" in options)
    result = open_checkpoint(tmp_path / "out")
    assert result.get("model.layers.0.input_layernorm.weight").dtype == torch.float32
    ids = [1, 403, 407, 261, 378]
    assert error(load(tmp_path / "out").logits(ids), load(STORIES).logits(ids)) < 0.1
