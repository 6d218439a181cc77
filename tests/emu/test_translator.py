"""The translator refuses what it does not know, with the line; and every form that it knows has been executed by a conformance kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from emu import emulator

HERE = Path(__file__).resolve().parent
PTX = """.version 9.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 k_param_0)
{{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<3>;
	ld.param.u64 	%rd1, [k_param_0];
	{}
	ret;
}}
"""


def translate(statement: str, folder: Path) -> subprocess.CompletedProcess:
    source = folder / "k.ptx"
    source.write_text(PTX.format(statement))
    return subprocess.run([sys.executable, HERE / "translate.py", source, folder / "k.cpp"], capture_output=True, text=True)


def test_what_is_known_is_translated(tmp_path):
    done = translate("add.s32 	%r1, %r2, 3;", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "add(" in (tmp_path / "k.cpp").read_text()


@pytest.mark.parametrize(
    "statement, why",
    [
        ("frobnicate.b32 	%r1, %r2;", "unknown opcode form: frobnicate.b32"),
        ("add.cc.s32 	%r1, %r2, %r3;", "unknown opcode form: add.cc.s32"),
        ("mul.lo.f32 	%r1, %r2, %r3;", "unknown opcode form: mul.lo.f32"),
        ("ld.global.b32.v2 	%r1, [%rd1];", "unknown opcode form"),
        ("cp.async.cg.shared.global.L2::64B 	[%r1], [%rd1], 16;", "unknown opcode form"),
        ("add.s32 	%r1, %r2;", "add.s32 with 2 operands"),
        ("add.s32 	%r1, %r2, %r3, %r4;", "add.s32 with 4 operands"),
        ("ld.global.v2.b32 	{%r1, %r2, %r3}, [%rd1];", "another number of registers"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 	{%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r3,%r4}, {%r5,%r6,%r7,%r8};", "another number of registers"),
        ("add.s32 	%r1, %q2, %r3;", "%q2"),
        ("bra 	$L_nowhere;", "unknown label"),
        ("mov.u32 	%r1, %clock;", "%clock"),
        ("{ .reg .f24 %x; mov.b32 %x, %r1; }", "f24"),
        ("setmaxnreg.dec.sync.aligned.u32 41;", "a multiple of 8"),
        ("{ call.uni vprintf; }", "not in this file"),
    ],
)
def test_what_is_not_known_is_refused_with_its_line(statement, why, tmp_path):
    done = translate(statement, tmp_path)
    assert done.returncode == 1 and why in done.stderr and "line 10" in done.stderr, done.stderr


def test_every_form_is_covered_by_a_conformance_kernel():
    if why := emulator.reason_to_skip():
        pytest.skip(why)
    emulator.kernels()
    used = sorted((emulator.BUILD / "tests" / "emu").glob("emu_kernels.*/*.json"))
    done = subprocess.run([sys.executable, HERE / "coverage.py", *used], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
