"""Every CUDA row of QLinear, forced by name, against float64: on the emulated GPUs, and with `-m gpu` on a real one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from emu import emulator
from emu.device import Emulated
from weights import MASKS, random_weight

from pyengine.qtensor import QTensor

MMA = 1  # ops.h, Layout
DTYPES = {torch.float16: 1, torch.bfloat16: 2}
BOUND = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # ops.h
# Kernel → tokens it is tried with.
DECODE = {"qlinear_decode_sm80": (1, 2, 3, 7, 8, 9, 16)}
GEMM = {"qlinear_gemm_sm80": (1, 17, 32, 33, 64, 70, 130)}
GEMM_SM90 = {"qlinear_gemm_sm90": (17, 33, 64, 65, 70, 128, 130)}
KERNELS = DECODE | GEMM | GEMM_SM90


@pytest.fixture
def kernel(request, device):
    name = request.param
    if name.endswith("_sm90") and device.arch != 90:
        pytest.skip("a kernel for compute capability 9.0")
    return name


def each_kernel(kernels=KERNELS):
    return pytest.mark.parametrize("kernel", kernels, indirect=True)
# (n, k, group): minimal, odd, several tiles of outputs, inputs that several blocks share, more inputs than an outlier's entry can tell apart,
# a group of more than a block's inputs.
SHAPES = (
    (1, 32, 32), (17, 64, 64), (33, 96, 32), (35, 37, 37), (130, 104, 104), (64, 256, 128), (100, 576, 64), (70, 1536, 128), (20, 4096 + 96, 32),
    (40, 1100, 1100),
)  # fmt: skip


def to_numpy(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint8).numpy() if t.dtype == torch.bfloat16 else t.contiguous().numpy()


class Problem:
    """A weight packed on the device, to be multiplied there and in float64."""

    def __init__(self, device, w: QTensor):
        self.device, self.w = device, w
        op = self.op = device.ops.QLinear()
        op.n, op.k, op.group, op.bits, op.scale_f32 = w.n, w.k, w.group, w.container, w.scale.dtype == torch.float32
        self.canonical = {"weight": w.weight, "scale": w.scale, "zero": w.zero}
        if w.outliers:
            self.canonical |= {"outlier_row": w.outlier_row, "outlier_col": w.outlier_col, "outlier_value": w.outlier_value}
        for name, t in self.canonical.items():
            setattr(op, name, 0 if t is None else t.data_ptr())
        self.packed = dict(zip(("weight", "scale", "zero"), (torch.empty(size, dtype=torch.uint8) for size in op.packed_bytes(MMA))))
        op.pack(MMA, *(t.data_ptr() for t in self.packed.values()))
        if w.outliers:
            lists = [torch.empty(count, dtype=torch.int32) for count in op.outlier_counts()]
            op.pack_outliers(*(t.data_ptr() for t in lists))
            self.packed |= dict(zip(("outlier_offset", "outlier_entry"), lists))
        if w.bias is not None:
            self.packed["bias"] = w.bias.float()
        if w.columns:
            self.packed |= {"column_index": w.column_index, "column_value": w.column_value}
        op.layout, op.columns = MMA, w.columns

    def place(self, m: int) -> None:
        """Puts everything on the device anew, for m tokens: a change of schedule has emptied it."""
        self.op.m = m
        for name in ("weight", "scale", "zero", "outlier_offset", "outlier_entry", "bias", "column_index", "column_value"):
            t = self.packed.get(name)
            setattr(self.op, name, 0 if t is None or not t.numel() else self.device.array(t.numpy(), name).ptr)
        size = self.op.workspace_bytes()
        self.op.workspace = self.device.array(np.zeros(size, np.uint8), "workspace", read_only=False).ptr if size else 0

    def run(self, kernel: str, x: torch.Tensor, residual: torch.Tensor | None = None, in_place: bool = False) -> torch.Tensor:
        """x [m, k], its rows padded to 16 bytes and one piece more → y [m, n], whose rows lie 3 values apart."""
        (m, k), n, op, device = x.shape, self.w.n, self.op, self.device
        op.m, op.dtype, op.x_stride, op.y_stride = m, DTYPES[x.dtype], (k + 7) // 8 * 8 + 8, n + 3
        wide = torch.full((m, op.x_stride), torch.nan, dtype=x.dtype)
        wide[:, :k] = x
        op.x = device.array(to_numpy(wide), "x").ptr
        start = torch.full((m, n + 3), 7, dtype=x.dtype)
        if residual is not None:
            start[:, :n] = residual
        y = device.array(to_numpy(start), "y", read_only=False)
        op.y = y.ptr
        op.residual = 0 if residual is None else y.ptr if in_place else device.array(to_numpy(start), "residual").ptr
        op.run(stream=device.stream, kernel=kernel)
        result = torch.from_numpy(y.numpy().copy()).view(x.dtype)
        assert (result[:, n:] == 7).all(), "wrote beyond its columns"
        return result[:, :n]

    def expected(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = x.double() @ self.w.dequantize().double().T
        if self.w.bias is not None:
            y += self.w.bias.double()
        return y if residual is None else y + residual.double()


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", (4, 8))
@each_kernel()
def test_shapes_masks_and_tokens(device, kernel, bits, dtype):
    """Every shape with every mask of outliers; tokens, zeros, the scales' type, bias, residual and the schedule change from case to case."""
    schedules = itertools.cycle(("in_order", "reverse", "greedy", "random"))
    for case, ((n, k, group), mask) in enumerate(itertools.product(SHAPES, MASKS)):
        m = KERNELS[kernel][case % len(KERNELS[kernel])]
        torch.manual_seed(case)
        problem = Problem(device, random_weight(n, k, group, bits, case % 2 == 1, mask, bias=case % 3 == 1, scale_f32=case % 5 > 2))
        device.reset()
        device.schedule(next(schedules), case, 1 + case % 2, 1 + case % 3)
        problem.place(m)
        x, residual = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype) if case % 4 > 1 else None
        y = problem.run(kernel, x, residual, in_place=case % 4 == 3)
        assert error(y, problem.expected(x, residual)) <= BOUND[dtype], (n, k, group, mask, m)
        device.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel()
def test_whole_columns(device, kernel, dtype):
    """Beside outliers, with steps of 16 that they do not fill and more than a block takes alone; and exactly, where nothing else is there."""
    for case, (n, k, group, columns, mask) in enumerate(((17, 64, 64, 1, "none"), (70, 1536, 128, 40, "sparse"), (129, 96, 32, 16, "full_row"))):
        for m in KERNELS[kernel][case % 2 :: 3]:
            w = random_weight(n, k, group, 4 + case % 2 * 4, case % 2 == 1, mask, bias=case == 1, columns=columns)
            problem, x = Problem(device, w), torch.randn(m, k).to(dtype)
            problem.place(m)
            assert error(problem.run(kernel, x), problem.expected(x)) <= BOUND[dtype], (n, k, columns, m)
        w = random_weight(n, k, group, columns=columns)
        w.scale, w.column_value = torch.zeros_like(w.scale), (torch.randint(-3, 4, (n, columns)) + 2.0**-7).half()  # 11 bits, more than bf16 has
        problem, x = Problem(device, w), torch.zeros(m, k)
        x[:, w.column_index.long()] = torch.randint(-3, 4, (m, columns)).float()
        problem.place(m)
        assert torch.equal(problem.run(kernel, x.to(dtype)), problem.expected(x).to(dtype))
        device.check()


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("kernel, tokens", (("qlinear_decode_sm80", (8, 16)), ("qlinear_gemm_sm80", (64, 130))))
def test_99_kib_of_shared_memory_are_enough(kernel, tokens, bits):
    """Compute capability 8.9 and 8.6 run the code for 8.0 and have less: tiles that do not fit give way to smaller ones."""
    if why := emulator.reason_to_skip():
        pytest.skip(why)
    ada = Emulated(*emulator.module()[:1], 89, emulator.module()[1])
    problem = Problem(ada, random_weight(130, 1536, 128, bits, mask="sparse"))
    for m in tokens:
        ada.reset()
        problem.place(m)
        x = torch.randn(m, 1536).half()
        assert error(problem.run(kernel, x), problem.expected(x)) <= BOUND[x.dtype]
        ada.check()


@each_kernel()
def test_every_schedule_gives_the_same_bits(device, kernel):
    """Several blocks share outputs here, whose sums must be added in one order whoever comes last."""
    problem, m = Problem(device, random_weight(130, 1536, 128, 4, True, "dense")), KERNELS[kernel][-2]
    x, results = torch.randn(m, 1536).half(), []
    for _ in device.schedules(seeds=2):
        problem.place(m)
        results.append(problem.run(kernel, x))
        results.append(problem.run(kernel, x))  # the counters of the workspace are zero again
    assert all(torch.equal(y, results[0]) for y in results)


@each_kernel()
def test_every_schedule_is_free_of_races(device, kernel):
    for bits, (n, k, group), scale_f32, columns in ((4, (100, 576, 64), False, 0), (8, (70, 1024 + 32, 32), True, 20)):
        w = random_weight(n, k, group, bits, True, "sparse", bias=True, scale_f32=scale_f32, columns=columns)
        problem, m = Problem(device, w), KERNELS[kernel][-1]
        x = torch.randn(m, k).bfloat16()
        for schedule in device.schedules(seeds=3):
            problem.place(m)
            assert error(problem.run(kernel, x), problem.expected(x)) <= BOUND[x.dtype], schedule


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel(DECODE)
def test_decode_multiplies_codes_and_outliers_exactly(device, kernel, dtype):
    """Scales of 1 and small whole numbers everywhere: f32 sums them exactly, and y has room for each. All codes, all zeros up to 127."""
    for bits in (4, 8):
        w = random_weight(40, 576, 64, bits, True, "sparse")
        w.scale = torch.ones_like(w.scale)
        w.outlier_value = torch.randint(-3, 4, w.outlier_value.shape) + torch.tensor(2.0**-7).half()  # 11 bits, more than bf16 has
        problem = Problem(device, w)
        problem.place(8)
        x = torch.zeros(8, 576)
        x[torch.arange(8), torch.randint(0, 576, (8,))] = 1
        y = problem.run(kernel, x.to(dtype))
        assert torch.equal(y, problem.expected(x).to(dtype))


@each_kernel(DECODE)
def test_decode_keeps_all_digits_of_f32_scales(device, kernel):
    """Scales that f16 cannot tell apart, one weight an output and token: the residual takes away what y in f16 would have room for."""
    w = random_weight(70, 192, 64, asymmetric=True, scale_f32=True)
    w.scale = 1 + torch.arange(70 * 3).view(70, 3) * 2.0**-20
    problem = Problem(device, w)
    problem.place(8)
    x = torch.zeros(8, 192).half()
    x[torch.arange(8), torch.randint(0, 192, (8,))] = 1
    residual = -problem.expected(x).half()
    wanted = problem.expected(x, residual)
    assert (wanted != 0).any() and (problem.run(kernel, x, residual).double() - wanted).abs().max() <= 1e-6


@each_kernel()
def test_a_kernel_waits_for_the_one_that_writes_its_input(device, kernel):
    """On Hopper it starts while that one runs: each of its warps that reads x must wait, and before it adds the residual."""
    problem, m = Problem(device, random_weight(130, 1536, 128, mask="sparse")), KERNELS[kernel][-1]
    x, weight = torch.randn(m, 1536).half(), torch.rand(1536)
    for _ in device.schedules(seeds=1):
        problem.place(m)
        normed = device.array(np.zeros((m, 1536), np.float16), "normed", read_only=False)
        norm, op = device.ops.RmsNorm(), problem.op
        norm.m, norm.n, norm.eps, norm.dtype, norm.y = m, 1536, 1e-5, 1, normed.ptr
        norm.x, norm.weight = device.array(x.numpy(), "x").ptr, device.array(weight.numpy(), "weight").ptr
        y = device.empty((m, 1536), np.float16, "y")
        op.dtype, op.x, op.x_stride, op.y, op.y_stride, op.residual = 1, normed.ptr, 1536, y.ptr, 1536, normed.ptr
        norm.run(stream=device.stream, kernel="rmsnorm_sm80")
        op.run(stream=device.stream, kernel=kernel)
        x_read = torch.from_numpy(normed.numpy().copy())
        found = torch.from_numpy(y.numpy()[:, :130].copy())
        assert error(found, problem.expected(x_read, x_read[:, :130])) <= BOUND[torch.float16]


@each_kernel()
def test_a_token_with_nan_leaves_its_neighbours_alone(device, kernel):
    problem, m = Problem(device, random_weight(20, 96, 32, mask="sparse")), KERNELS[kernel][-1]
    problem.place(m)
    x = torch.randn(m, 96).half()
    x[1, 50] = torch.nan
    y = problem.run(kernel, x)
    others = torch.arange(m) != 1
    assert torch.isnan(y[1]).all() and error(y[others], problem.expected(x)[others]) <= BOUND[x.dtype]


@each_kernel()
def test_a_kernel_says_what_it_refuses(device, kernel):
    problem = Problem(device, random_weight(20, 96, 32))
    for change, why in (
        ({"act_bits": 8}, "activations of 16 bits"),
        ({"x_stride": 97}, "16-byte aligned"),
        ({"x": 8}, "16-byte aligned"),
        ({"m": 17}, "up to 16 tokens" if kernel in DECODE else ""),
    ):
        op = device.ops.QLinear(problem.op)
        op.dtype = 1
        for name, value in change.items():
            setattr(op, name, value)
        if why:
            with pytest.raises(RuntimeError, match=f"{kernel}: .*{why}"):
                op.choose(kernel)
        else:
            assert op.choose(kernel) == kernel


def test_ops_of_one_stream_share_a_workspace(device):
    """What one leaves as sums must not be another's counters: more tiles of outputs, whose inputs several blocks share, come second."""
    first, second = Problem(device, random_weight(64, 1024, 128)), Problem(device, random_weight(64 * 70, 1024, 128))
    x = torch.randn(1, 1024).half()
    for problem in (first, second):
        problem.place(1)
    first.op.workspace = second.op.workspace
    for problem in (first, second):
        assert error(problem.run("qlinear_decode_sm80", x), problem.expected(x)) <= BOUND[x.dtype]
