"""Bits by a map and by choice: patterns, what each linear ends up with, and the allocation against trying everything."""

import itertools
import json

import pytest
import torch
from stories import STORIES, needs_stories, quiet

from pyengine.cli import main
from pyengine.formats import open_checkpoint
from pyengine.loader import load
from pyengine.models import llama
from pyengine.qtensor import QTensor
from pyengine.quant import auto
from pyengine.quant.auto import Form, allocate, hull
from pyengine.quant.common import Spec, quantize_matrix
from pyengine.quantizer import bits_map, quantize


def stored(out, name) -> QTensor:
    config = llama.Config.from_dict(open_checkpoint(STORIES).config)
    return QTensor.read(name, *config.linear_shape(name.split(".", 3)[3]), open_checkpoint(out).get)


# ---- a map


def test_the_first_pattern_that_matches_decides():
    spec = Spec(bits=4, group_size=128, bits_map=bits_map({"layers.0.*": 8, "down_proj": {"bits": 3, "group_size": 32}, "model.layers.1.mlp.*": 2}))
    for name, bits, group in (("0.mlp.down_proj", 8, 128), ("1.mlp.down_proj", 3, 32), ("1.mlp.up_proj", 2, 128), ("10.mlp.up_proj", 4, 128)):
        assert (spec.at(f"model.layers.{name}").bits, spec.at(f"model.layers.{name}").group_size) == (bits, group), name


@needs_stories
@pytest.mark.parametrize("method", ["rtn", "gwq", "gptq", "rsq", "boa", "gpfq", "awq", "rex"])
def test_every_linear_has_the_bits_of_the_map(tmp_path, text, method):
    options = {"samples": 2, "seq_len": 24} if method != "rtn" else {}
    said = {"down_proj": 8, "self_attn.k_proj": {"bits": 8, "group_size": 32}, "layers.4.*": {"bits": 4, "group_size": 32}}
    quantize(STORIES, tmp_path / "out", method, calib=text, bits_map=said, group_size=64, progress=quiet, **options)
    for name, container, group in (("0.mlp.down_proj", 8, 172), ("2.self_attn.k_proj", 8, 32), ("2.mlp.up_proj", 4, 64), ("4.mlp.up_proj", 4, 32)):
        q = stored(tmp_path / "out", f"model.layers.{name}")
        assert (q.container, q.group) == (container, group), name
    assert open_checkpoint(tmp_path / "out").config["quantization_config"]["bits_map"][0] == ["down_proj", 8, None]
    ids, source = [1, 403, 407, 261, 378], load(STORIES)
    assert float((load(tmp_path / "out").logits(ids) - source.logits(ids)).norm() / source.logits(ids).norm()) < 0.3


@needs_stories
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"donw_proj": 8}, "bits_map: 'donw_proj' matches no linear of the model, which has model.layers.0.self_attn.q_proj"),
        ({"down_proj": 5}, "bits of 'down_proj' is 5, expected one of 2, 3, 4, 8"),
        ({"down_proj": True}, "bits of 'down_proj' is True"),
        ({"down_proj": {"bits": 4, "group_size": 48}}, "group_size of 'down_proj' is 48"),
        ({"down_proj": {"group_size": 32}}, "expected bits, or an object of bits and group_size"),
        ([4], "expected an object of patterns and bits"),
    ],
)
def test_maps_that_make_no_sense(tmp_path, capsys, said, message):
    (tmp_path / "map.json").write_text(json.dumps(said))
    assert main(["quantize", str(STORIES), str(tmp_path / "out"), "--method", "rtn", "--bits-map", str(tmp_path / "map.json")]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1 and not list(tmp_path.glob("out*"))


def test_a_map_that_is_no_json(tmp_path, capsys):
    (tmp_path / "map.json").write_text("{down_proj: 8}")
    assert main(["quantize", "x", str(tmp_path / "out"), "--bits-map", str(tmp_path / "map.json")]) == 1
    assert "map.json: not JSON: " in capsys.readouterr().err


# ---- by choice


def test_a_hull_has_falling_gains():
    found = [Form(4, 64, 0, size, lost) for size, lost in ((10, 100), (12, 90), (12, 60), (14, 58), (16, 10), (20, 9), (22, 30), (8, 130))]
    assert [(f.size, f.lost) for f in hull(found)] == [(8, 130), (12, 60), (16, 10), (20, 9)]
    gains = [auto.gain(a, b) for a, b in itertools.pairwise(hull(found))]
    assert gains == sorted(gains, reverse=True)


def test_the_allocation_is_as_good_as_trying_everything_allows():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        choices = {}
        for name in "abcde":
            sizes = torch.randint(10, 60, (4,), generator=g).sort().values.tolist()
            losses = torch.rand(4, generator=g).sort(descending=True).values.tolist()
            choices[name] = [Form(4, 64, 0, s, v) for s, v in zip(sizes, losses)]
        least = sum(min(f.size for f in found) for found in choices.values())
        for budget in (least, least + 30, least + 90, 10**6):
            chosen = allocate(choices, budget)
            size, lost = sum(f.size for f in chosen.values()), sum(f.lost for f in chosen.values())
            best = min(sum(f.lost for f in all_of) for all_of in itertools.product(*choices.values()) if sum(f.size for f in all_of) <= budget)
            step = max(a.lost - b.lost for found in choices.values() for a, b in itertools.pairwise(hull(found) + [hull(found)[-1]]))
            assert size <= budget and best <= lost + 1e-9 <= best + step + 1e-6, (seed, budget)
    with pytest.raises(ValueError, match=f"but the smallest forms take {least}"):
        allocate(choices, least - 1)


def test_forms_cost_and_lose_what_they_say():
    w, fisher = torch.randn(24, 192), torch.rand(24, 192) ** 4
    found, places = auto.forms(w, fisher, Spec(group_size=64))
    assert [(f.bits, f.group) for f in found[:: len(auto.SHARES)]] == [(4, 64), (4, 32), (8, 64)] and len(found) == 2 * len(auto.SHARES) + 1
    for form in found:
        count = int(form.share * w.numel())
        mask = torch.zeros(w.numel(), dtype=torch.bool)
        if count:
            mask[places[form.group][:count].long()] = True
        q = quantize_matrix(w, Spec(bits=form.bits, group_size=form.group), mask.view(w.shape)).check()
        assert q.nbytes == form.size, form
        plain = quantize_matrix(w, Spec(bits=form.bits, group_size=form.group)).dequantize()
        lost = (fisher * (w - plain).square()).flatten()
        assert form.lost == pytest.approx(float(lost[~mask].sum()), rel=1e-3) and (not count or float(lost[mask].min()) >= float(lost[~mask].max()))


@needs_stories
@pytest.mark.parametrize("target", [4.6, 5.5])
def test_the_file_has_the_bits_that_were_asked_for(tmp_path, text, target):
    def run(out):
        return quantize(STORIES, tmp_path / out, "auto", calib=text, samples=2, seq_len=24, group_size=32, target_bits=target, progress=quiet)

    done = run("out")
    assert target - 0.15 < done["bits_per_weight"] <= target and sum(done["statistics"]["forms"].values()) == 35
    assert len(done["statistics"]["forms"]) > 3
    run("again")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    refused = (({}, "auto needs target_bits"), ({"target_bits": 0}, "target_bits is 0, expected"), ({"target_bits": 4.0}, "smallest forms"))
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            quantize(STORIES, tmp_path / "no", "auto", calib=text, samples=2, seq_len=24, progress=quiet, **options)
