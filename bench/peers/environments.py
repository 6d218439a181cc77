"""The peers' virtual environments and their forms of a model, made once in the cache folder and found there afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"


class PeerError(RuntimeError):
    """A peer cannot be set up; the message is one line for its row."""


@dataclass(frozen=True)
class Environment:
    """What `pip install` gets, and what the build of a source package needs."""

    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


# llama.cpp is compiled for this very machine; its multimodal part is not needed. Its flags name a file, so it must not contain spaces.
LLAMA_CPP = f"-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS=-include{HERE / 'ldtilecfg.h'}"
ENVIRONMENTS = {
    "llama.cpp": Environment(
        ("llama-cpp-python==0.3.36",), options=("--no-binary", "llama-cpp-python"), variables={"CMAKE_ARGS": LLAMA_CPP, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    ),
    "transformers": Environment((TORCH, "transformers==5.24.0", "torchao==0.18.0", "accelerate", "gguf")),
    "ctranslate2": Environment((TORCH, "transformers==5.24.0", "ctranslate2==4.8.5")),
    # The torchvision that it draws in is for another torch, and transformers trips over it.
    "openvino": Environment((TORCH, "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0"), unwanted=("torchvision",)),
}


def _run(command: list[str | Path], log: Path, what: str, **variables: str) -> None:
    """Run with output in `log`; raises PeerError with its last line."""
    print(f"{what} (output in {log})", file=sys.stderr, flush=True)
    with open(log, "a") as out:
        done = subprocess.run(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **variables})
    if done.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise PeerError(f"{what}: failed with code {done.returncode}: {lines[-1][:200] if lines else 'no output'}; see {log}")


def environment(peer: str, cache: Path) -> Path:
    """The Python of a peer's virtual environment, which is made if it is not there or was made for other requirements."""
    wanted, folder = ENVIRONMENTS[peer], cache / f"venv-{peer}"
    stamp, python = folder / "installed", folder / "bin" / "python"
    contents = "\n".join(wanted.requirements + wanted.options) + "\n"
    if stamp.exists() and stamp.read_text() == contents:
        return python
    log = cache / f"{peer}.log"
    log.unlink(missing_ok=True)
    if not python.exists():
        _run([sys.executable, "-m", "venv", folder], log, f"{peer}: making a virtual environment")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", *wanted.options, *wanted.requirements], log, f"{peer}: installing, a few minutes where it is compiled", **wanted.variables)
    if wanted.unwanted:
        _run([*pip, "uninstall", "-y", *wanted.unwanted], log, f"{peer}: removing {', '.join(wanted.unwanted)}")
    stamp.write_text(contents)
    return python


def model(form: str, gguf: Path, name: str, group: int, cache: Path) -> Path:
    """The model of `gguf` in one of the peers' forms: a GGUF type, `hf`, `ct2` or `ov`. `group` divides the inputs of all its linears."""
    if form == "gguf":
        return gguf
    log = cache / f"{name}-{form}.log"
    if form in ("q4_0", "q4_k_m", "q8_0"):
        out = cache / f"{name}-{form}.gguf"
        if not out.exists():
            _run([environment("llama.cpp", cache), HERE / "llamacpp_quantize.py", gguf, out, form], log, f"quantizing to {form}")
        return out
    out = cache / f"{name}-{form}"
    if out.exists():
        return out
    if form == "hf":
        _run([environment("transformers", cache), HERE / "hf_from_gguf.py", gguf, out], log, "converting to a Hugging Face directory")
        return out
    source, partial = model("hf", gguf, name, group, cache), out.with_name(out.name + ".partial")  # so that a directory under the final name is whole
    shutil.rmtree(partial, ignore_errors=True)
    if form == "ct2":
        converter = environment("ctranslate2", cache).with_name("ct2-transformers-converter")
        _run([converter, "--model", source, "--output_dir", partial, "--quantization", "int8"], log, "converting for CTranslate2")
    else:
        exporter = environment("openvino", cache).with_name("optimum-cli")
        options = ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", str(group), "--ratio", "1.0"]
        _run([exporter, "export", "openvino", "--model", source, *options, partial], log, "converting for OpenVINO")
    partial.rename(out)
    return out
