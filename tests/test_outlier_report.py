"""The report of where outliers sit, against counting, and its files."""

import builtins
import json

import pytest
import torch
from stories import STORIES, needs_stories
from weights import random_weight

from pyengine.formats import open_checkpoint
from pyengine.models import llama
from pyengine.outlier_report import Crowding, kept_by_line, measure
from pyengine.qtensor import QTensor
from pyengine.quantizer import quantize


def test_rows_and_columns_are_counted():
    for columns in (0, 3):
        q = random_weight(40, 96, 32, mask="one_tile", columns=columns)
        kept = torch.zeros(40, 96)
        kept[torch.repeat_interleave(torch.arange(40), q.outlier_row.diff()), q.outlier_col.long()] = 1
        if columns:
            kept[:, q.column_index.long()] = 1
        rows, by_column = kept_by_line(q)
        assert torch.equal(rows, kept.sum(1).double()) and torch.equal(by_column, kept.sum(0).double())


def test_what_the_fullest_lines_hold():
    even, one = Crowding(), Crowding()
    even.add(torch.full((200,), 3.0).double())
    one.add(torch.tensor([0.0] * 198 + [30, 10]).double())
    assert even.summary()["curve"] == pytest.approx([i / 100 for i in range(101)]) and even.summary()["empty"] == 0
    found = one.summary()
    assert found["fullest_1_percent"] == 1 and found["empty"] == 0.99 and found["curve"][0] == 0
    one.add(torch.full((100,), 0.4).double())  # as many outliers, spread evenly
    assert one.summary()["fullest_1_percent"] == pytest.approx((1 + 0.01) / 2)


@needs_stories
def test_report_and_its_files(tmp_path, capsys, monkeypatch):
    options = {"group_size": 32, "score": "abs_w", "outliers": 0.05, "progress": lambda items, label: items}
    done = quantize(STORIES, tmp_path / "out", report_folder=tmp_path / "why" / "there", **options)
    found = done["outliers"]
    assert json.loads((tmp_path / "why" / "there" / "outliers.json").read_text()) == found == measure(open_checkpoint(tmp_path / "out"))
    result, config = open_checkpoint(tmp_path / "out"), llama.Config.from_dict(open_checkpoint(STORIES).config)
    q = QTensor.read("model.layers.3.mlp.up_proj", *config.linear_shape("mlp.up_proj"), result.get)
    assert found["blocks"][3]["mlp.up_proj"] == q.outliers / (q.n * q.k) and len(found["by_block"]) == 5
    assert found["share"] == pytest.approx(done["outlier_share"]) and found["share"] == pytest.approx(sum(found["by_block"]) / 5)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "why" / "there" / "outliers.png").read_bytes().startswith(b"\x89PNG")


@needs_stories
def test_without_matplotlib_or_outliers(tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert quantize(STORIES, tmp_path / "out", "rtn", report_folder=tmp_path, progress=lambda items, label: items)["outliers"] == {}
    assert json.loads((tmp_path / "outliers.json").read_text()) == {} and not (tmp_path / "outliers.png").exists()
    assert "matplotlib is not installed" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        quantize(STORIES, tmp_path / "other", "rtn", report_folder=tmp_path / "file", progress=lambda items, label: items)
    assert not (tmp_path / "other").exists()
