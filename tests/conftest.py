"""What several test files use: real models where they are at hand, random quantized weights, skewed outlier masks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from emu.device import device, kernel_device  # noqa: F401  (fixtures)
from stories import TEXT


def pytest_addoption(parser):
    parser.addoption("--native-module", help="load this file as pyengine._C (test_avx512.py runs the kernel tests on an emulated one)")
    parser.addoption("--qwen2", metavar="FILE", help="a GGUF of Qwen2.5-Coder-0.5B-Instruct for the tests on the real model")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: on a real GPU")
    path = config.getoption("--native-module")
    if path:
        import pyengine

        spec = importlib.util.spec_from_file_location("pyengine._C", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["pyengine._C"] = pyengine._C = module


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip("the folder with test texts and models is not beside the repository")
    return DATA


@pytest.fixture(scope="session")
def stories(data) -> Path:
    """A real 260k-parameter Llama in float32 with a SentencePiece vocabulary."""
    return data / "models" / "stories260k"


@pytest.fixture
def float32_products(monkeypatch):
    """Matrix products of calibration as a CPU without bfloat16 tiles makes them."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)


@pytest.fixture
def text(tmp_path) -> Path:
    """A text to calibrate on, of some 1000 tokens."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    from pyengine import demo
    from pyengine.errors import CheckpointError

    try:
        return demo.source()
    except CheckpointError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def qwen2_gguf(pytestconfig) -> Path:
    """Half a GB that no package brings in one piece: whoever has it names it."""
    path = pytestconfig.getoption("--qwen2")
    if path is None:
        pytest.skip("no real Qwen2 was given (--qwen2 FILE.gguf)")
    return Path(path)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests neither use nor fill the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
