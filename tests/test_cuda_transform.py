"""Every CUDA row of Transform, forced by name: exactly where everything is a small whole number, else within the rounding of its steps. On
the emulated GPUs, and with `-m gpu` on a real one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

DTYPES = {torch.float16: 1, torch.bfloat16: 2}
BOUND = {torch.float16: 1e-3, torch.bfloat16: 1e-2}  # ops.h
KERNELS = ("transform_sm80", "transform_sm90")
# (a, b, which factors there are): model-sized, padded, odd, one factor, none; b no multiple of 8; factors that stay in L2.
SHAPES = ((64, 64, "lr"), (112, 128, "lr"), (86, 128, "lr"), (24, 24, "lr"), (32, 48, "lr"))
SHAPES += ((9, 64, "l"), (1, 160, "r"), (16, 10, "lr"), (4, 24, ""), (2, 520, ""), (224, 128, "lr"))
HOPPER = SHAPES[:2]  # those that transform_sm90 is for


@pytest.fixture(params=KERNELS)
def kernel(request, device):
    if request.param.endswith("_sm90") and device.arch != 90:
        pytest.skip("a kernel for compute capability 9.0")
    return request.param


def to_numpy(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint8).numpy() if t.dtype == torch.bfloat16 else t.contiguous().numpy()


class Site:
    """A site's input x [m, n or 2n], its factors and what comes before them: "", "norm" or "gated"."""

    def __init__(self, m: int, a: int, b: int, factors: str, dtype: torch.dtype, before: str = "", whole: bool = False):
        self.m, self.a, self.b, self.n, self.dtype, self.before = m, a, b, a * b, dtype, before
        width = 2 * self.n if before == "gated" else self.n
        self.x = torch.randint(-4, 5, (m, width)).to(dtype) if whole else torch.randn(m, width).to(dtype)
        if not whole:
            self.x[:, :: self.b + 1] *= 8
        self.weight = torch.rand(self.n) + 0.5 if before == "norm" else None
        self.left = self.factor(a, whole) if "l" in factors else None
        self.right = self.factor(b, whole) if "r" in factors else None
        self.clip = torch.tensor([0.9, 0.8])

    @staticmethod
    def factor(size: int, whole: bool) -> torch.Tensor:
        """Invertible, neither orthogonal nor symmetric; or three ones of either sign a column."""
        if not whole:
            return (torch.linalg.qr(torch.randn(size, size))[0] * (torch.rand(size) + 0.5)).half()
        chosen = torch.rand(size, size).argsort(0) < 3
        return (chosen * (torch.randint(0, 2, (size, size)) * 2 - 1)).half()

    def t(self) -> torch.Tensor:
        """f32[m, n], rounded where the kernels round."""
        v = self.x.double()
        if self.before == "gated":
            v = torch.nn.functional.silu(v[:, : self.n]) * v[:, self.n :]
        if self.before == "norm":
            v = v / (v.square().mean(1, keepdim=True) + 1e-5).sqrt() * self.weight
        if self.left is None and self.right is None:
            return v.float()
        u = v.to(self.dtype).double().view(self.m, self.a, self.b)
        if self.right is not None:
            u = u @ self.right.to(self.dtype).double()
            u = u.to(self.dtype).double() if self.left is not None else u
        if self.left is not None:
            u = self.left.to(self.dtype).double().T @ u
        return u.reshape(self.m, self.n).float()

    def codes(self, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes i8[m, n] and scale f32[m], as ops.h says."""
        t, most = self.t(), (1 << (bits - 1)) - 1
        scale = torch.maximum(t.clamp(min=0).amax(1) * self.clip[0], (-t).clamp(min=0).amax(1) * self.clip[1]) / most
        inverse = torch.where(scale > 0, 1 / scale, 0)
        return (t * inverse[:, None]).round().clamp(-most - 1, most).to(torch.int8), scale

    def run(self, device, kernel: str, bits: int = 0) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """y [m, n], and with `bits` codes i8[m, n] and scale f32[m]."""
        op, stride = device.ops.Transform(), self.n + 8
        op.m, op.n, op.a, op.b, op.dtype, op.eps, op.gated = self.m, self.n, self.a, self.b, DTYPES[self.dtype], 1e-5, self.before == "gated"
        wide = torch.full((self.m, self.x.shape[1] + 8), torch.nan, dtype=self.dtype)
        wide[:, :-8] = self.x
        op.x, op.x_stride, op.y_stride = device.array(to_numpy(wide), "x").ptr, wide.shape[1], stride
        for name in ("weight", "left", "right"):
            if (values := getattr(self, name)) is not None:
                setattr(op, name, device.array(values.numpy(), name).ptr)
        y = device.array(to_numpy(torch.full((self.m, stride), 7, dtype=self.dtype)), "y", read_only=False)
        op.y = y.ptr
        if bits:
            code, scale = device.empty((self.m, self.n * bits // 8), np.uint8, "code"), device.empty(self.m, np.float32, "scale")
            op.bits, op.code, op.scale, op.clip = bits, code.ptr, scale.ptr, device.array(self.clip.numpy(), "clip").ptr
        op.run(stream=device.stream, kernel=kernel)
        found = torch.from_numpy(y.numpy().copy()).view(self.dtype).view(self.m, stride)
        assert (found[:, self.n :] == 7).all(), "wrote beyond its columns"
        if not bits:
            return found[:, : self.n], None, None
        codes = torch.from_numpy(code.numpy().copy())
        if bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), 2).view(self.m, self.n)
            codes = (codes ^ 8).to(torch.int8) - 8
        return found[:, : self.n], codes.view(torch.int8), torch.from_numpy(scale.numpy().copy())


def skip_unless_taken(kernel: str, dtype: torch.dtype) -> None:
    if kernel.endswith("_sm90") and dtype != torch.float16:
        pytest.skip("takes f16")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_whole_numbers_are_exact(device, kernel, dtype):
    """Codes, scales and y have the very bits; tokens, bits of the codes and schedules change from shape to shape."""
    schedules, tokens = itertools.cycle(("in_order", "reverse", "greedy", "random")), itertools.cycle((1, 3, 19))
    skip_unless_taken(kernel, dtype)
    for i, (a, b, factors) in enumerate(HOPPER if kernel.endswith("_sm90") else SHAPES):
        for bits in (4, 8):
            site = Site(1 if a * b > 8192 else next(tokens), a, b, factors, dtype, whole=True)
            device.reset()
            device.schedule(next(schedules), i, 1 + i % 2, 1 + i % 3)
            y, codes, scale = site.run(device, kernel, bits)
            assert torch.equal(y, site.t().to(dtype)), (a, b, factors)
            expected = site.codes(bits)
            assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1]), (a, b, factors, bits)
            device.check()


@pytest.mark.parametrize("before", ("", "norm", "gated"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_numbers_are_within_their_rounding(device, kernel, dtype, before):
    """Sums rounded in another order move a code to its neighbour now and then, by one."""
    skip_unless_taken(kernel, dtype)
    for a, b, factors in HOPPER[:1] if kernel.endswith("_sm90") else ((64, 64, "lr"), (24, 40, "lr"), (9, 64, "l"), (4, 24, "")):
        site = Site(3, a, b, factors, dtype, before)
        y, codes, scale = site.run(device, kernel, 8)
        t = site.t()
        assert (y.double() - t).norm() <= BOUND[dtype] * t.norm(), (a, b, factors)
        expected, expected_scale = site.codes(8)
        assert torch.allclose(scale, expected_scale, rtol=BOUND[dtype]), (a, b, factors)
        off = (codes.int() - expected.int()).abs()
        assert off.max() <= 1 and (off > 0).double().mean() <= 0.03, (a, b, factors, off.double().mean())


def test_every_schedule_is_free_of_races(device, kernel):
    """Blocks take several tokens one after another, and several together; the same bits every time."""
    first = None
    site = Site(41, *((64, 64) if kernel.endswith("_sm90") else (24, 40)), "lr", torch.float16, "norm")
    for _ in device.schedules(seeds=2):
        found = site.run(device, kernel, 8)
        first = first or found
        assert all(torch.equal(now, before) for now, before in zip(found, first))


def test_a_token_of_zeros_and_one_with_nan(device, kernel):
    site = Site(3, 64, 64, "lr", torch.float16)
    site.x[0], site.x[1, 5] = 0, torch.inf
    _, codes, scale = site.run(device, kernel, 8)
    assert scale[0] == 0 and scale[1].isnan() and (codes[:2] == 0).all()
    expected, expected_scale = site.codes(8)
    assert torch.allclose(scale[2], expected_scale[2], rtol=1e-3) and (codes[2].int() - expected[2].int()).abs().max() <= 1


def test_what_it_refuses(device, kernel):
    op = device.ops.Transform()
    op.m, op.dtype, op.a, op.b, op.n = 1, 1, 24, 24, 576
    for change, why in (
        ({"a": 23}, "whose product is n"),
        ({"x_stride": 577}, "16-byte aligned"),
        ({"code": 16, "bits": 3}, "8 or 4 bits"),
        ({"code": 8}, "not 16-byte aligned"),
        ({"a": 1, "b": 576, "right": 16}, "factors of 1 to 256"),
        ({"a": 256, "b": 256, "n": 65536, "left": 16}, "takes two factors" if kernel.endswith("_sm90") else "does not fit"),
    ):
        changed = device.ops.Transform(op)
        for name, value in change.items():
            setattr(changed, name, value)
        with pytest.raises(RuntimeError, match=why):
            changed.choose(kernel)
