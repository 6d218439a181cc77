"""The `device` fixture: one test, two devices. Arrays are numpy in and numpy out; kernels get their addresses.

On the emulated GPUs every byte is watched (see README.md beside this file); on a real one (`pytest -m gpu`) the arrays have red zones around
them, and read-only ones are compared at the end.

    def test_rmsnorm(device):
        for _ in device.schedules():
            x, y = device.array(values), device.empty(values.shape, np.float16)
            op = device.ops.RmsNorm()
            op.x, op.y, … = x.ptr, y.ptr, …
            op.run(stream=device.stream, kernel="rmsnorm_sm80")
            assert error(y.numpy(), expected) < bound
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from emu import emulator

ORDERS = ("in_order", "reverse", "greedy", "random")
ZONE = 512  # bytes of a red zone on a real GPU


class Reported(AssertionError):
    """What the checks of the emulator have found."""


class Array:
    """A typed piece of the device's memory."""

    def __init__(self, device, ptr: int, shape: tuple[int, ...], dtype: np.dtype):
        self.device, self.ptr, self.shape, self.dtype = device, ptr, shape, dtype
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

    def numpy(self) -> np.ndarray:
        return self.device.download(self)


class Emulated:
    """An emulated GPU of one architecture in a library that holds the kernels."""

    emulated = True

    def __init__(self, library, arch: int, ops=None):
        self.library, self.arch, self.ops = library, arch, ops
        self.schedule("random", 1)
        library.emu_reset()
        self.stream = library.emu_stream()  # not the default stream: a launcher that forgets its stream is found out

    def schedule(self, order: str, seed: int, workers: int = 1, resident: int = 1) -> None:
        self.library.emu_configure(seed, ORDERS.index(order), workers, resident, self.arch)

    def schedules(self, seeds: int = 2) -> Iterator[str]:
        """Each order of the threads and blocks in turn; what has been reported fails the test after each."""
        plan = [("in_order", 1, 2, 1), ("reverse", 1, 2, 1)]
        plan += [(order, 1 + s, *(((1, 4), (2, 2))[s % 2])) for s in range(seeds) for order in ("greedy", "random")]
        for order, seed, workers, resident in plan:
            self.reset()
            self.schedule(order, seed, workers, resident)
            yield f"{order}, seed {seed}, {workers} workers, {resident} blocks each"
            self.check()

    def reset(self) -> None:
        self.library.emu_reset()
        self.stream = self.library.emu_stream()

    def new_stream(self) -> int:
        return self.library.emu_stream()

    def array(self, values: np.ndarray, name: str = "input", read_only: bool = True) -> Array:
        values = np.ascontiguousarray(values)
        made = self.empty(values.shape, values.dtype, name)
        self.library.emu_upload(made.ptr, values.ctypes.data, values.nbytes)
        if read_only:
            self.library.emu_protect(made.ptr, values.nbytes, 1)
        return made

    def empty(self, shape, dtype, name: str = "output") -> Array:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        made = Array(self, 0, shape, np.dtype(dtype))
        made.ptr = self.library.emu_allocate(made.nbytes, name.encode())
        assert made.ptr, "the emulated GPU is out of memory"
        return made

    def download(self, array: Array) -> np.ndarray:
        self.library.emu_synchronize(self.stream)  # and no other: results of a kernel in another stream are not waited for
        values = np.empty(array.shape, array.dtype)
        assert self.library.emu_download(values.ctypes.data, array.ptr, array.nbytes)
        return values

    def reports(self) -> list[str]:
        return self.library.emu_reports().decode().splitlines()

    def check(self) -> None:
        if found := self.reports():
            raise Reported("\n".join(found))


class Gpu:
    """A real GPU, through torch."""

    emulated = False

    def __init__(self, library=None, ops=None):
        import torch

        self.torch, self.library, self.ops = torch, library, ops
        major, minor = torch.cuda.get_device_capability()
        self.arch = major * 10 + minor
        self.reset()

    def reset(self) -> None:
        self.kept: list = []
        self.streams = [self.torch.cuda.Stream()]
        self.stream = self.streams[0].cuda_stream

    def schedules(self, seeds: int = 2) -> Iterator[str]:
        yield "the GPU's own"
        self.check()
        self.reset()

    def schedule(self, order: str, seed: int, workers: int = 1, resident: int = 1) -> None:
        """A GPU has its own."""

    def new_stream(self) -> int:
        self.streams.append(self.torch.cuda.Stream())
        return self.streams[-1].cuda_stream

    def _place(self, content: np.ndarray, shape, dtype, read_only: bool) -> Array:
        padded = np.full(content.nbytes + 2 * ZONE, 0xA5, np.uint8)
        padded[ZONE : ZONE + content.nbytes] = content.view(np.uint8).reshape(-1)
        tensor = self.torch.from_numpy(padded).cuda()
        self.torch.cuda.synchronize()
        self.kept.append((tensor, padded, read_only, content.nbytes))
        return Array(self, tensor.data_ptr() + ZONE, shape, np.dtype(dtype))

    def array(self, values: np.ndarray, name: str = "input", read_only: bool = True) -> Array:
        values = np.ascontiguousarray(values)
        return self._place(values, values.shape, values.dtype, read_only)

    def empty(self, shape, dtype, name: str = "output") -> Array:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self._place(np.full(count, 0xCD, np.uint8), shape, dtype, False)

    def download(self, array: Array) -> np.ndarray:
        self.torch.cuda.synchronize()
        tensor = next(t for t, *_ in self.kept if t.data_ptr() + ZONE == array.ptr)
        return tensor[ZONE : ZONE + array.nbytes].cpu().numpy().view(array.dtype).reshape(array.shape)

    def reports(self) -> list[str]:
        self.torch.cuda.synchronize()
        found = []
        for tensor, before, read_only, size in self.kept:
            now = tensor.cpu().numpy()
            changed = now != before
            if not read_only:
                changed[ZONE : ZONE + size] = False
            if changed.any():
                found.append(f"byte {int(changed.argmax()) - ZONE} of an array of {size} bytes was written")
        return found

    def check(self) -> None:
        if found := self.reports():
            raise Reported("\n".join(found))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def torch_capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability()


WHERE = ("emulated sm_80", "emulated sm_90a", pytest.param("gpu", marks=pytest.mark.gpu))


def open_device(where: str, module: bool):
    """module: with the project's kernels; else with the emulator's own test kernels."""
    if where == "gpu":
        if not has_gpu():
            pytest.skip("no CUDA device")
        if module:
            from pyengine import _C

            return Gpu(ops=_C)
        if torch_capability() != (9, 0):
            pytest.skip("the test kernels are built for compute capability 9.0")
        return Gpu(library=emulator.gpu_kernels())
    if why := emulator.reason_to_skip():
        pytest.skip(why)
    arch = 90 if where.endswith("90a") else 80
    library, ops = emulator.module() if module else (emulator.kernels(), None)
    return Emulated(library, arch, ops)


@pytest.fixture(params=WHERE)
def device(request):
    """A device with the project's kernels in `device.ops`, a module like pyengine._C."""
    opened = open_device(request.param, module=True)
    yield opened
    opened.check()


@pytest.fixture(params=WHERE)
def kernel_device(request):
    """A device with the emulator's own test kernels in `device.library`."""
    opened = open_device(request.param, module=False)
    yield opened
    opened.reports()
