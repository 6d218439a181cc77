"""Builds the emulated kernels once a session and loads them: build/emu in the repository, so that a second run builds nothing."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emu"


def reason_to_skip() -> str:
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "not a Linux system"
    return "" if " f16c " in flags and " avx2 " in flags else "the emulator needs an x86-64 CPU with AVX2 and F16C"


def build(*targets: str, options: tuple[str, ...] = (), folder: Path = BUILD) -> Path:
    """The folder of the libraries. The environment's cmake and ninja are used: they need not be on PATH."""
    environment = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += ["-DPYENGINE_CUDA=OFF", "-DPYENGINE_EMU=ON", *options]
    for command in (configure, ["cmake", "--build", folder, "--target", *targets]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{command[:2]} failed:\n{done.stdout[-6000:]}{done.stderr[-3000:]}")
    return folder / "tests" / "emu"


@functools.cache
def module():
    """The library of the project's kernels and its module, a second pyengine._C."""
    path = build("emu_module") / "_C.so"
    return load_library(path), load_module(path)


@functools.cache
def kernels() -> ctypes.CDLL:
    """The library of the emulator's own test kernels."""
    return load_library(build("emu_kernels") / "libemu_kernels.so")


@functools.cache
def gpu_kernels() -> ctypes.CDLL:
    """The same kernels as nvcc builds them for a GPU."""
    return ctypes.CDLL(str(build("gpu_kernels") / "libgpu_kernels.so"))


def load_module(path: Path):
    """The module _C at `path`, beside the installed one."""
    loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
    spec = importlib.util.spec_from_loader("_C", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def load_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    u64, text, number = ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("configure", None, (u64, number, number, number, number)),
        ("allocate", u64, (u64, text)),
        ("upload", number, (u64, ctypes.c_void_p, u64)),
        ("download", number, (ctypes.c_void_p, u64, u64)),
        ("protect", None, (u64, u64, number)),
        ("stream", u64, ()),
        ("synchronize", None, (u64,)),
        ("capture", None, (u64, u64)),
        ("reports", text, ()),
        ("mma_count", u64, ()),
        ("reset", None, ()),
    ):
        function = getattr(library, f"emu_{name}")
        function.restype, function.argtypes = result, arguments
    return library
