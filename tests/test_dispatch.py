"""The dispatch table itself: ranks, forced rows, reasons, and that vector code stays within its own files."""

from __future__ import annotations

import shutil
import subprocess
from itertools import groupby
from pathlib import Path

import pytest
import torch
from weights import random_weight

from pyengine import _C, ops
from pyengine.linear import Linear

ROOT = Path(__file__).resolve().parents[1]


def test_every_op_has_an_oracle_and_no_two_rows_share_a_rank():
    for op, rows in ops.kernels().items():
        assert [(r["name"].endswith("_reference"), r["device"]) for r in rows if r["rank"] == 0] == [(True, "cpu")], op
        for (device, rank), same in groupby(sorted(rows, key=lambda r: (r["device"], r["rank"])), key=lambda r: (r["device"], r["rank"])):
            assert len(list(same)) == 1, (op, device, rank)


def test_the_highest_rank_that_can_run_is_chosen():
    def best(op, most=99):
        return max((r for r in op.kernels() if r["device"] == "cpu" and r["missing"] is None and r["rank"] <= most), key=lambda r: r["rank"])["name"]

    for op in (_C.QLinear, _C.Embedding, _C.RmsNorm, _C.SiluMul):
        assert op().choose() == best(op, most=4)
    rope = _C.RopeKV()
    rope.head_dim = 64
    for rope.m, rope.q_transform, most in ((512, 0, 3), (15, 64, 3), (16, 64, 4)):  # a basis, which is not looked at
        assert rope.choose() == best(_C.RopeKV, most)
    layer = Linear(random_weight(8, 64, 32))
    assert layer.kernel_name(1) == layer.kernel_name(15) == best(_C.QLinear, most=3)
    assert layer.kernel_name(16) == layer.kernel_name(4096) == best(_C.QLinear, most=4)
    assert Linear(random_weight(8, 64, 32), act_bits=8).kernel_name(15) == best(_C.QLinear, most=3)
    for bits in (4, 8):
        assert Linear(random_weight(8, 64, 32), act_bits=bits).kernel_name(16) == best(_C.QLinear, most=5)
    attention = _C.Attention()
    for attention.m, attention.head_dim, most in ((15, 64, 3), (16, 64, 99), (16, 80, 3)):
        assert attention.choose() == best(_C.Attention, most)


def test_a_kernel_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="no kernel is called 'gemm_magic'"):
        Linear(random_weight(8, 64, 32), kernel="gemm_magic")
    for row in _C.QLinear.kernels():
        if row["missing"]:
            with pytest.raises(RuntimeError, match=row["missing"].split(" with ")[0]):
                Linear(random_weight(8, 64, 32), kernel=row["name"])
    big = torch.zeros(1, 2 * 512)
    k = torch.zeros(1, 1, 4, 512).half()
    where = torch.zeros(1, dtype=torch.int32)
    vector = max((r for r in _C.Attention.kernels() if r["device"] == "cpu" and r["rank"] < 4), key=lambda r: (r["missing"] is None, r["rank"]))
    if vector["rank"]:
        with pytest.raises(RuntimeError, match="head_dim is above 256"):
            ops.attention(big, k, k, where, where, 1.0, kernel=vector["name"])
    assert ops.attention(big, k, k, where, where, 1.0).shape == (1, 1024)  # the oracle takes it


def test_matrix_units_say_what_they_are_not_for():
    amx = next((r for r in _C.QLinear.kernels() if r["name"] == "qlinear_amx"), None)
    if amx is None or amx["missing"]:
        pytest.skip("this machine has no AMX")
    layer = Linear(random_weight(8, 64, 32), kernel="qlinear_amx")
    with pytest.raises(RuntimeError, match="fewer than 16 tokens"):
        layer(torch.randn(15, 64))
    with pytest.raises(RuntimeError, match="16-bit activations"):
        Linear(random_weight(8, 64, 32), 8, "qlinear_amx")
    with pytest.raises(RuntimeError, match="of 8 or 4 bits"):
        Linear(random_weight(8, 64, 32), 16, "qlinear_amx_int8")
    with pytest.raises(RuntimeError, match="fewer than 16 tokens"):
        Linear(random_weight(8, 64, 32), 8, "qlinear_amx_int8")(torch.randn(15, 64))
    with pytest.raises(RuntimeError, match="halves of whole tiles"):
        Linear(random_weight(34, 64, 32), 8, "qlinear_amx_int8", gated=True)
    op = _C.Attention()
    for op.m, op.head_dim, why in ((15, 64, "fewer than 16 rows"), (16, 80, "multiple of 32"), (16, 512, "above 256")):
        with pytest.raises(RuntimeError, match=why):
            op.choose("attention_amx")


def test_packed_weights_run_on_their_own_kernel_only():
    layer = Linear(random_weight(8, 64, 32))
    if layer._op.layout == 0:
        pytest.skip("this machine has the scalar kernel alone, which reads weights unpacked")
    layer.kernel = "qlinear_reference"
    with pytest.raises(RuntimeError, match="packed for another kernel"):
        layer(torch.randn(1, 64))


def test_vector_files_export_no_code_that_other_machines_would_run():
    """A weak symbol of an AVX-512 file may replace the plain copy for every machine when the linker picks one."""
    objects = [path for name in ("avx2", "avx512", "amx") for path in ROOT.glob(f"build/python*/**/kernels_{name}.dir/**/*.o")]
    if not objects or not shutil.which("nm"):
        pytest.skip("the build folder or nm is not here")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        assert not [line for line in symbols.splitlines() if f" {line.split()[1]} " in (" W ", " V ", " u ")], path
