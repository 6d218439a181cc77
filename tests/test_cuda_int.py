"""Linears with INT8 and INT4 activations on CUDA, forced by name: y has the very bits that exact sums give. On the emulated GPUs, and with
`-m gpu` on a real one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_cuda_transform import Site, to_numpy
from weights import random_weight

from pyengine.qtensor import unpack_codes

MMA = 1  # ops.h, Layout
DTYPES = {torch.float16: 1, torch.bfloat16: 2}
TYPES = ((4, 8), (8, 8), (4, 4))  # bits of weights and of activations
# Kernel → tokens it is tried with, and its types on compute capability 8.x and 9.0.
TOKENS = {"qlinear_int_sm80": (1, 7, 17, 32, 33, 64, 70, 130), "qlinear_int_sm90": (1, 17, 64, 65, 128, 130)}
# (n, k): minimal, odd, tails of 64, inputs that several blocks share; 15 tiles that one block has to itself, more than its ring has room for.
SHAPES = ((1, 32), (17, 96), (70, 576), (130, 1568), (200, 64), (33, 960))


def runs_on(kernel: str, act_bits: int, arch: int) -> bool:
    return arch == 90 if kernel.endswith("_sm90") else act_bits == 8 or arch < 90


@pytest.fixture(params=[(kernel, *types) for kernel in TOKENS for types in TYPES], ids=lambda p: f"{p[0]}-w{p[1]}a{p[2]}")
def case(request, device):
    """(kernel, bits of weights, bits of activations) where the device can run it."""
    kernel, bits, act_bits = request.param
    if not runs_on(kernel, act_bits, device.arch):
        pytest.skip("for another compute capability")
    return request.param


class Problem:
    """y = x_scale · w_scale · (codes of x · codes of w) + columns + bias + residual, on the device and exactly."""

    def __init__(
        self, device, n: int, k: int, bits: int, act_bits: int, bias: bool = False, scale_f32: bool = False, columns: int = 0, group: int = 0
    ):
        self.device, self.bias = device, torch.randn(n) if bias else None
        self.w = random_weight(n, k, group or k, bits, scale_f32=scale_f32, columns=columns)
        if group:  # with powers of two f32 sums over groups are exact too
            self.w.scale = (2.0 ** torch.randint(-2, 1, self.w.scale.shape)).to(self.w.scale.dtype)
        if columns:  # whole numbers and a little, which takes all of f16's 11 bits: f32 sums of them are exact
            self.w.column_value = (torch.randint(-7, 8, (n, columns)) + 2.0**-7).half()
        op = self.op = device.ops.QLinear()
        op.columns = columns
        op.n, op.k, op.group, op.bits, op.act_bits, op.scale_f32 = n, k, group or k, bits, act_bits, scale_f32
        op.weight, op.scale = self.w.weight.data_ptr(), self.w.scale.data_ptr()
        self.packed = [torch.empty(size, dtype=torch.uint8) for size in op.packed_bytes(MMA)[:2]]
        op.pack(MMA, *(t.data_ptr() for t in self.packed), 0)
        op.layout = MMA

    def inputs(self, m: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, all of them possible, the first token with the largest only; and scales."""
        top = 1 << (self.op.act_bits - 1)
        codes = torch.randint(-top, top, (m, self.op.k), dtype=torch.int8)
        codes[0] = -top
        return codes, torch.rand(m) * 0.01 + 0.001

    def column_inputs(self, m: int, dtype: torch.dtype) -> torch.Tensor | None:
        """x [m, k], of which nothing but the columns may be read."""
        if not self.w.columns:
            return None
        x = torch.full((m, self.op.k), torch.nan, dtype=dtype)
        x[:, self.w.column_index.long()] = torch.randint(-9, 10, (m, self.w.columns)).to(dtype)
        return x

    def run(
        self, kernel: str, codes, scale, dtype: torch.dtype, residual: torch.Tensor | None = None, x: torch.Tensor | None = None, act_bits: int = 16
    ) -> torch.Tensor:
        """codes i8[m, k] and scale f32[m], with x [m, k] for the columns; or x alone, for `act_bits`."""
        device, n, op = self.device, self.op.n, self.device.ops.QLinear(self.op)
        op.act_bits = act_bits if codes is None else op.act_bits
        m = op.m = len(x if codes is None else codes)
        packed = codes if codes is None or op.act_bits == 8 else (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
        op.dtype, op.x_stride, op.y_stride = DTYPES[dtype], op.k, n + 3
        arrays = {"weight": self.packed[0], "scale": self.packed[1], "x": x, "x_code": packed, "x_scale": scale, "bias": self.bias}
        arrays |= {"column_index": self.w.column_index, "column_value": self.w.column_value}
        for name, t in arrays.items():
            setattr(op, name, 0 if t is None else device.array(to_numpy(t), name).ptr)
        size = op.workspace_bytes()
        op.workspace = device.array(np.zeros(size, np.uint8), "workspace", read_only=False).ptr if size else 0
        start = torch.full((m, n + 3), 7, dtype=dtype)
        if residual is not None:
            start[:, :n] = residual
        y = device.array(start.view(torch.uint8).numpy(), "y", read_only=False)
        op.y, op.residual = y.ptr, 0 if residual is None else y.ptr
        op.run(stream=device.stream, kernel=kernel)
        result = torch.from_numpy(y.numpy().copy()).view(dtype).view(m, n + 3)
        assert (result[:, n:] == 7).all(), "wrote beyond its columns"
        return result[:, :n]

    def expected(self, codes, scale, dtype: torch.dtype, residual: torch.Tensor | None = None, x: torch.Tensor | None = None) -> torch.Tensor:
        w = unpack_codes(self.w.weight, self.op.k, self.op.bits).int() - (1 << (self.op.bits - 1))
        if self.w.group == self.op.k:
            y = (codes.long() @ w.long().T).float() * (self.w.scale.float().T * scale[:, None])
        else:
            parts = [part.long().unflatten(1, (-1, self.w.group)) for part in (codes, w)]
            y = (torch.einsum("mgc,ngc->mng", *parts).float() * self.w.scale.float()).sum(2) * scale[:, None]
        for first in range(0, self.w.columns, 16):  # as many make a step
            step = slice(first, first + 16)
            y = y + x[:, self.w.column_index[step].long()].float() @ self.w.column_value[:, step].float().T
        if self.bias is not None:
            y = y + self.bias
        return (y if residual is None else y + residual.float()).to(dtype)


def test_every_shape_has_the_very_bits(device, case):
    kernel, bits, act_bits = case
    schedules = itertools.cycle(("in_order", "reverse", "greedy", "random"))
    tokens, dtypes = itertools.cycle(TOKENS[kernel]), itertools.cycle(DTYPES)
    for i, (n, k) in enumerate(SHAPES * 2):
        m, dtype = next(tokens), next(dtypes)
        problem = Problem(device, n, k, bits, act_bits, bias=i % 3 == 0, scale_f32=i % 4 == 1)
        device.reset()
        device.schedule(next(schedules), i, 1 + i % 2, 1 + i % 3)
        codes, scale = problem.inputs(m)
        residual = torch.randn(m, n).to(dtype) if i % 2 else None
        assert torch.equal(problem.run(kernel, codes, scale, dtype, residual), problem.expected(codes, scale, dtype, residual)), (n, k, m, dtype)
        device.check()


def test_every_schedule_is_free_of_races(device, case):
    """Several blocks share outputs, and then a block's ring of tiles goes round; with columns that fill no step, and groups."""
    kernel, bits, act_bits = case
    for n, k, m, columns, group in ((130, 1568, TOKENS[kernel][-2], 17, 0), (20, 960, 33, 0, 0), (70, 1152, 33, 0, 128), (20, 960, 33, 0, 64)):
        problem = Problem(device, n, k, bits, act_bits, columns=columns, group=group)
        codes, scale = problem.inputs(m)
        x = problem.column_inputs(m, torch.float16)
        for schedule in device.schedules(seeds=1):
            y = problem.run(kernel, codes, scale, torch.float16, x=x)
            assert torch.equal(y, problem.expected(codes, scale, torch.float16, x=x)), schedule


def test_groups_are_scaled_one_by_one(device, case):
    kernel, bits, act_bits = case
    tokens, schedules = itertools.cycle(TOKENS[kernel]), itertools.cycle(("in_order", "reverse", "greedy", "random"))
    for i, (n, k, group) in enumerate(((17, 128, 64), (70, 576, 64), (130, 1152, 128), (200, 256, 128), (33, 1088, 64), (1, 1920, 128))):
        for dtype in DTYPES:
            m = next(tokens)
            problem = Problem(device, n, k, bits, act_bits, scale_f32=i % 2 == 1, columns=i, group=group)
            device.reset()
            device.schedule(next(schedules), i, 1 + i % 2, 1 + i % 3)
            codes, scale = problem.inputs(m)
            x = problem.column_inputs(m, dtype)
            assert torch.equal(problem.run(kernel, codes, scale, dtype, x=x), problem.expected(codes, scale, dtype, x=x)), (n, k, group, m)
            device.check()


def test_columns_are_added_to_the_exact_sums(device, case):
    kernel, bits, act_bits = case
    tokens, dtypes = itertools.cycle(TOKENS[kernel]), itertools.cycle(DTYPES)
    for i, (n, k, columns) in enumerate(((1, 32, 1), (17, 96, 3), (70, 576, 16), (200, 64, 33), (33, 960, 17), (129, 96, 2))):
        m, dtype = next(tokens), next(dtypes)
        problem = Problem(device, n, k, bits, act_bits, bias=i % 3 == 0, columns=columns)
        codes, scale = problem.inputs(m)
        x, residual = problem.column_inputs(m, dtype), torch.randn(m, n).to(dtype) if i % 2 else None
        y = problem.run(kernel, codes, scale, dtype, residual, x)
        assert torch.equal(y, problem.expected(codes, scale, dtype, residual, x)), (n, k, columns, m)
        device.check()


def test_the_oracle_says_the_same(device, case):
    """Given x alone, of which the kernels and the oracle make the same codes."""
    kernel, bits, act_bits = case
    problem, m, dtype = Problem(device, 70, 576, bits, act_bits, columns=5), TOKENS[kernel][-1], torch.float16
    x, y = torch.randn(m, 576).to(dtype), torch.empty(m, 70)
    op, wide = device.ops.QLinear(problem.op), x.float()
    op.m, op.dtype, op.layout, op.x, op.x_stride, op.y, op.y_stride = m, 0, 0, wide.data_ptr(), 576, y.data_ptr(), 70
    for name in ("weight", "scale", "column_index", "column_value"):
        setattr(op, name, getattr(problem.w, name).data_ptr())
    op.run(kernel="qlinear_reference")
    found = problem.run(kernel, None, None, dtype, x=x, act_bits=act_bits)
    assert (found.double() - y.double()).norm() <= 1e-3 * y.double().norm()


def test_few_tokens_of_a_w4a4_checkpoint_run_on_the_kernel_for_16_bits(device):
    """The same packed weights: up to 16 tokens read Transform's y, more of them its codes, and every other row says why it does not."""
    problem = Problem(device, 70, 576, 4, 4)
    op = device.ops.QLinear(problem.op)
    op.dtype = 1
    for m, act_bits, kernel in ((1, 16, "qlinear_decode_sm80"), (8, 16, "qlinear_decode_sm80"), (64, 4, f"qlinear_int_sm{device.arch}")):
        op.m, op.act_bits, op.x_code, op.x_scale = m, act_bits, 0 if act_bits == 16 else 16, 16
        assert op.choose() == kernel
    site = Site(8, 24, 24, "lr", torch.float16)
    t, _, _ = site.run(device, "transform_sm80")
    y = problem.run("qlinear_decode_sm80", None, None, torch.float16, x=t)
    expected = site.t().double() @ problem.w.dequantize().double().T
    assert (y.double() - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("change, why", (
    ({"act_bits": 16}, "activations of 8 or 4 bits"),
    ({"group": 32}, "groups of 64, 128 or a whole row"),
    ({"zero": 16}, "symmetric weights"),
    ({"outlier_row": 16}, "no single FP16 outliers"),
    ({"columns": 1}, "takes x for the columns"),
    ({"k": 584, "group": 584}, "no multiple of 16"),
    ({"x_code": 0}, "x_code and x_scale together"),
    ({"x_code": 0, "x_scale": 0, "x": 8}, "rows of x are not 16-byte aligned"),
    ({"x_code": 0, "x_scale": 0, "x_stride": 580}, "rows of x are not 16-byte aligned"),
    ({"x_code": 8}, "not 16-byte aligned"),
))  # fmt: skip
def test_a_kernel_says_what_it_refuses(device, change, why):
    op = device.ops.QLinear(Problem(device, 70, 576, 4, 8).op)
    for name, value in ({"m": 33, "dtype": 1, "x_code": 16, "x_scale": 16} | change).items():
        setattr(op, name, value)
    with pytest.raises(RuntimeError, match=f"qlinear_int_sm80: .*{why}"):
        op.choose("qlinear_int_sm80")


def test_int4_is_for_tensor_cores_that_know_it(device):
    op = device.ops.QLinear(Problem(device, 70, 576, 4, 4).op)
    op.m, op.dtype, op.x_code, op.x_scale = 33, 1, 16, 16
    if device.arch < 90:
        assert op.choose("qlinear_int_sm80") == "qlinear_int_sm80"
    else:
        with pytest.raises(RuntimeError, match="INT4 on compute capability 8.x"):
            op.choose("qlinear_int_sm80")
