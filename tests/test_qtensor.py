"""The format's invariants: each broken one is refused with the tensor's name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from weights import MASKS, random_weight

from pyengine.errors import CheckpointError
from pyengine.qtensor import GROUPS, KEYS, QTensor, fit_group, pack_codes, unpack_codes


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bits", (4, 8))
def test_dequantize_follows_the_formula(bits, mask):
    w = random_weight(35, 96, 32, bits, asymmetric=True, mask=mask, columns=5)
    codes = unpack_codes(w.weight, w.k, bits)
    expected = torch.empty(35, 96)
    for j in range(35):
        for c in range(96):
            expected[j, c] = w.scale[j, c // 32].float() * (int(codes[j, c]) - int(w.zero[j, c // 32]))
    if w.outliers:
        for j in range(35):
            for e in range(int(w.outlier_row[j]), int(w.outlier_row[j + 1])):
                expected[j, int(w.outlier_col[e])] = w.outlier_value[e].float()
    for i, c in enumerate(w.column_index):
        expected[:, c] = w.column_value[:, i].float()
    assert torch.equal(w.dequantize(), expected)
    rows = torch.tensor([4, 4, 34, 0])
    assert torch.equal(w.dequantize(rows), expected[rows])


@pytest.mark.parametrize("k", (2, 7, 64))
def test_codes_survive_packing(k):
    codes = torch.randint(0, 16, (5, k)).to(torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, 4), k, 4), codes)
    assert pack_codes(codes, 4)[0, 0] == codes[0, 0] + 16 * (codes[0, 1])  # even column in the low nibble


def test_fit_group():
    assert [fit_group(g, 576) for g in (128, 64, 32, 0, 1000)] == [64, 64, 32, 576, 576]
    assert fit_group(128, 172) == 172 and fit_group(128, 96) == 96 and fit_group(64, 96) == 32


def broken(change) -> QTensor:
    w = random_weight(16, 64, 32, asymmetric=True, mask="sparse", bias=True, columns=3)
    w.name = "model.layers.0.mlp.down_proj"
    assert w.outliers > 2
    change(w)
    return w


def put(t: torch.Tensor, at, value) -> torch.Tensor:
    t = t.to(torch.int32) if t.dtype == torch.uint16 else t.clone()
    t[at] = value
    return t


BROKEN = {
    "scale: 1 values are NaN": lambda w: setattr(w, "scale", put(w.scale, (3, 1), torch.nan)),
    r"scale: shape \[16, 3\]": lambda w: setattr(w, "scale", torch.ones(16, 3).half()),
    r"scale: shape \[15, 2\]": lambda w: setattr(w, "scale", w.scale[:15]),
    "scale: group size 16": lambda w: setattr(w, "scale", torch.ones(16, 4).half()),
    "a matrix of 16 × 1 is not supported": lambda w: setattr(w, "k", 1),
    "scale: dtype float64": lambda w: setattr(w, "scale", w.scale.double()),
    r"weight: shape \[16, 31\]": lambda w: setattr(w, "weight", w.weight[:, 1:]),
    "weight: dtype int32": lambda w: setattr(w, "weight", w.weight.int()),
    "weight: code": lambda w: setattr(w, "weight", w.weight ^ 17),
    "zero: shape": lambda w: setattr(w, "zero", w.zero[:, :1]),
    "bias: contains NaN": lambda w: setattr(w, "bias", put(w.bias, 2, torch.inf)),
    "outlier_col: column 64 is out of range": lambda w: setattr(w, "outlier_col", put(w.outlier_col, 1, 64)),
    "outlier_col: columns of a row must rise": lambda w: (
        setattr(w, "outlier_row", torch.tensor([0] * 16 + [w.outliers], dtype=torch.int32)),
        setattr(w, "outlier_col", torch.zeros(w.outliers, dtype=torch.int32)),
    ),
    "outlier_row: must rise from 0": lambda w: setattr(w, "outlier_row", put(w.outlier_row, 5, 10**6)),
    "outlier_row: must rise from 0 to": lambda w: setattr(w, "outlier_row", put(w.outlier_row, 16, 1)),
    "outlier_row: shape": lambda w: setattr(w, "outlier_row", w.outlier_row[1:]),
    "outlier_value: contains NaN": lambda w: setattr(w, "outlier_value", put(w.outlier_value, 0, torch.nan)),
    "column_index: column 64 is out of range": lambda w: setattr(w, "column_index", put(w.column_index, 2, 64)),
    "column_index: columns must rise": lambda w: setattr(w, "column_index", w.column_index[[0, 2, 1]]),
    "column_index: dtype int64": lambda w: setattr(w, "column_index", w.column_index.long()),
    "column_index: is empty": lambda w: (setattr(w, "column_index", w.column_index[:0]), setattr(w, "column_value", w.column_value[:, :0])),
    r"column_value: shape \[16, 2\]": lambda w: setattr(w, "column_value", w.column_value[:, 1:]),
    "column_value: contains NaN": lambda w: setattr(w, "column_value", put(w.column_value, (3, 1), torch.inf)),
    "code .* at column": lambda w: setattr(w, "weight", put(w.weight, (7, int(w.column_index[1]) // 2), int(w.weight[7, int(w.column_index[1]) // 2]) ^ 17)),
    "is kept whole in column_value": lambda w: setattr(w, "outlier_col", put(w.outlier_col, 0, int(w.column_index[0]))),
    "column_index and column_value must exist together": lambda w: setattr(w, "column_value", None),
    "must exist together": lambda w: setattr(w, "outlier_col", None),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_invariant_is_refused_by_name(message):
    with pytest.raises(CheckpointError, match=message) as caught:
        broken(BROKEN[message]).check()
    assert "model.layers.0.mlp.down_proj" in str(caught.value)


def test_the_unbroken_one_passes():
    broken(lambda w: None).check()


def test_ops_h_states_the_same_format():
    """The kernels' header and this module describe one format; what one of them gains the other must."""
    header = (Path(__file__).resolve().parents[1] / "csrc" / "ops.h").read_text()
    struct = header[header.index("struct QLinear") : header.index("struct RmsNorm")]
    members = set(re.findall(r"\*?(\w+)(?: = [^;]+)?;", struct))
    assert set(KEYS) <= members
    groups = re.search(r"inputs that share a scale: ([\d, ]+) or k", struct).group(1)
    assert {int(g) for g in groups.split(",")} == set(GROUPS)
