"""FlexRound and LRQ: they begin as rounding to nearest, bit for bit, and what they learn is what the file holds."""


import pytest
import torch
from stories import STORIES, needs_stories

from pyengine.formats import open_checkpoint
from pyengine.loader import load
from pyengine.models import llama
from pyengine.quant import flexround, lrq, training
from pyengine.quant.calibration import Batches, FloatModel
from pyengine.quant.common import Block, Spec, quantize_matrix
from pyengine.quant.merge import observe
from pyengine.quantizer import quantize

pytestmark = needs_stories


@pytest.fixture
def block(tmp_path):
    model = FloatModel.of(open_checkpoint(STORIES))
    batches = Batches(model, torch.randint(3, 500, (6, 40)), tmp_path, lambda items, label: items)
    weights = model.block(2)
    weights["mlp.up_proj.bias"] = torch.randn(weights["mlp.up_proj.weight"].shape[0]) / 5
    x = batches.inputs(2)
    block = Block(2, "model.layers.2.", weights, llama.SITES, batches.forward, tmp_path, model.config)
    block.quantized_inputs, block.inputs = lambda: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 0.02, lambda: x
    return block


def masks_of(block, spec):
    masks = {}
    for name in block.linears[1:]:  # the first has none
        shape = block.weights[f"{name}.weight"].shape
        masks[name] = (torch.rand(shape) < 0.02) if spec.scope != "columns" else (torch.rand(1, shape[1]) < 0.05).expand(shape)
    return masks


@pytest.mark.parametrize("method", [flexround, lrq])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"bits": 3, "group_size": 0}, {"bits": 8, "scope": "columns"}, {"bits_map": (("down_proj", 8, None),)}]
)
def test_without_steps_it_is_rounding_to_nearest(block, method, options):
    spec = Spec(**{"group_size": 32, "steps": 0} | options)
    masks = masks_of(block, spec)
    for name, q in method.round_block(block, block.inputs, spec, masks).items():
        w, bias = block.weights[f"{name}.weight"], block.weights.get(f"{name}.bias")
        expected = quantize_matrix(w, spec.at(block.prefix + name), masks.get(name), bias).check().tensors()
        assert q.check().tensors().keys() == expected.keys()
        assert all(torch.equal(t, expected[key]) for key, t in q.tensors().items()), name
    assert flexround.statistics(block.folder)["moved"] == [0.0]


@pytest.mark.parametrize("method", [flexround, lrq])
def test_the_block_loses_less(block, method):
    spec = Spec(bits=3, group_size=32, steps=40)
    found = method.round_block(block, block.inputs, spec, {})
    noted = flexround.statistics(block.folder)
    assert noted["relative_error_after"][0] < 0.8 * noted["relative_error_before"][0] and noted["moved"][0] > 0.01
    weights = block.weights | {f"{name}.weight": q.dequantize() for name, q in found.items()}
    target = observe(block, block.inputs())[0]
    after = training.relative_error(lambda x: block.forward(weights, x), block.quantized_inputs(), target)
    assert after == pytest.approx(noted["relative_error_after"][0], rel=0.02)  # what was trained is what is stored


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_stored_is_what_was_learned(symmetric, rank):
    w, mask = torch.randn(12, 64), torch.rand(12, 64) < 0.05
    m = flexround.Divided(w, Spec(bits=3, group_size=32, symmetric=symmetric), mask, rank, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in m.parameters():
            p += torch.randn(p.shape) * 0.3
    q = m.stored(torch.ones(12), "w").check(12)
    assert torch.equal(q.dequantize(), m()) and q.outliers == int(mask.sum()) and q.bias is not None
    assert float(m.moved().max()) >= 2


@pytest.mark.parametrize("options", [{"method": "flexround"}, {"method": "lrq"}, {"method": "gwq", "rounding": "flexround", "outliers": 0.02}])
def test_checkpoints_are_reproducible_and_run(tmp_path, options):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who liked to play outside. One day she saw a big red ball. " * 20)
    options = options | {"calib": text, "samples": 3, "seq_len": 24, "steps": 3, "group_size": 32, "progress": lambda items, label: items}
    done = quantize(STORIES, tmp_path / "a", **options)
    quantize(STORIES, tmp_path / "b", **options)
    quantize(STORIES, tmp_path / "c", **options | {"seed": 1})
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c and done["spec"]["steps"] == 3
    ids, source = [1, 403, 407, 261, 378], load(STORIES)
    assert float((load(tmp_path / "a").logits(ids) - source.logits(ids)).norm() / source.logits(ids).norm()) < 0.3


def test_refused_requests(tmp_path):
    for options, message in (
        ({"method": "flexround", "rounding": "gptq"}, "flexround is a rounding itself"),
        ({"method": "lrq", "rounding": "flexround"}, "lrq is a rounding itself"),
        ({"method": "flexround", "grid": "search"}, "flexround learns its grid"),
        ({"method": "gwq", "steps": 3}, "gwq does not train"),
        ({"method": "gwq", "rounding": "flexround", "steps": -1}, "steps is -1, expected"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(STORIES, tmp_path / "no", **options)
