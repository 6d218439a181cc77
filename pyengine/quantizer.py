"""The quantization driver: source checkpoint in, PyEngine checkpoint out, one block in memory at a time.

A method is a module in `pyengine/quant/` named like the method ('-' becomes '_') with

    complete(spec) -> Spec                                 its defaults; samples 0 means that it reads no text
    prepare(model, batches, spec) -> dict                  optional: a pass over the whole model before the blocks; statistics
    quantize_block(block, inputs, spec) -> dict            linear name → QTensor; also tensors by their name inside the block
                                                           (`attn_in.left`, `input_layernorm.weight`), which go beside or replace others
    statistics(folder) -> dict                             optional: what `quantize_block` noted in `block.folder`, for the report
    GROUP_SIZE, OUTLIERS, STEPS                            optional: its group size (else 128), outliers (else 0.01) and training steps (else none)
    MIXED_BITS                                             optional: it asks `spec.at(name)` for the bits of each linear

and, if other methods may have their weights rounded by it, what `quant/rounding.py` says. It decides codes and outliers; the driver
reads, names, writes, resumes and reports.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .checkpoint import Writer, require_free
from .formats import Checkpoint, open_checkpoint
from .inspect import shares
from .linear import stack
from .outlier_report import outlier_report
from .qtensor import QTensor, fit_group
from .quant.calibration import Batches, FloatModel, Progress, self_written, show_progress, text_windows, token_hash
from .quant.common import FLOAT16_MAX, Block, Spec, quantize_matrix
from .quant.rounding import load_rounding
from .tokenizer import Tokenizer, load_tokenizer

# Files in quant/ that are not methods.
HELPERS = (
    "__init__", "calibration", "columns", "common", "descent", "fakequant", "grid", "merge", "outliers", "rounding", "simulate", "training",
    "transforms",
)  # fmt: skip
HEAD_ROWS = 4096  # of the output matrix that are quantized at once
HEAD_GROUP = 32  # the block of GGUF's Q8_0: an output matrix that comes as Q8_0 stays exactly what it was
VERSION = 4  # of what is written: one more when the same options give other bytes


def methods() -> list[str]:
    """The names `method=` takes: the files of pyengine/quant."""
    return sorted(f.stem.replace("_", "-") for f in (Path(__file__).parent / "quant").glob("*.py") if f.stem not in HELPERS)


def load_method(name: str) -> ModuleType:
    """The module of a method; ValueError lists those there are."""
    if name not in methods():
        raise ValueError(f"method is {name!r}, expected one of {', '.join(methods())}")
    return importlib.import_module(f".quant.{name.replace('-', '_')}", __package__)


def quantize(
    model: str | os.PathLike | Checkpoint,
    out: str | os.PathLike,
    method: str = "gwq",
    *,
    calib: str | os.PathLike | None = None,
    resume: bool = False,
    report_folder: str | os.PathLike | None = None,
    progress: Progress = show_progress,
    **options,
) -> dict:
    """Quantize a checkpoint (a path, or what `open_checkpoint` returned) into the new directory `out`; returns a report.

    options are the fields of `Spec` (bits=4, group_size=None, outliers=0.01, …); None is the method's own. calib is a UTF-8 text to calibrate
    on; without one the model writes its own. `report_folder` gets outliers.json and, with matplotlib, outliers.png: where the weights sit
    that stay FP16. `progress(items, label)` wraps the long loops. act_bits and kv_bits are recorded for the runtime, which quantizes those as
    it runs. Raises ValueError for arguments that make no sense, CheckpointError for a source that cannot be trusted, OSError if the disk is
    full; in all of these `out` does not appear, and `resume=True` continues a run that was cut short.
    """
    module, spec = request(method, options)
    if report_folder is not None:
        Path(report_folder).mkdir(parents=True, exist_ok=True)
    require_free(out)  # before the minutes that a calibration text may take
    started = time.monotonic()
    checkpoint = open_checkpoint(model) if not isinstance(model, Checkpoint) else model
    source, tokenizer = FloatModel.of(checkpoint), load_tokenizer(checkpoint)
    check_patterns(source, spec)
    ids = calibration_tokens(source, tokenizer, spec, calib, progress)
    text = token_hash(ids) if ids is not None else None
    identity = {"version": VERSION, "source": checkpoint.fingerprint(), "calibration": text, **asdict(spec)}
    writer = Writer(out, source.blocks + 1, identity, resume)
    seconds = {"calibration_text": time.monotonic() - started}

    started = time.monotonic()
    batches = Batches(source, ids, writer.work, progress, writer.read) if ids is not None else None
    statistics = module.prepare(source, batches, spec) if batches and hasattr(module, "prepare") else {}
    seconds["prepare"] = time.monotonic() - started

    started = time.monotonic()
    groups = announce_groups(source, spec)
    for i in progress(range(source.blocks), f"quantizing with {method}, block by block"):
        if not writer.has(i):
            writer.write(i, quantized_block(module, source, batches, writer.work, i, spec))
        if batches:
            batches.forget(i)
    if not writer.has(source.blocks):
        writer.write(source.blocks, outer_tensors(source, spec))
    statistics |= module.statistics(writer.work) if hasattr(module, "statistics") else {}
    sizes = writer.finish(output_config(checkpoint.config, spec, text), tokenizer.save)
    seconds["quantize"] = time.monotonic() - started
    done = report(source, spec, sizes, groups, statistics, {k: round(v, 2) for k, v in seconds.items()})
    return done | {"outliers": outlier_report(open_checkpoint(out), report_folder)}


def request(method: str, options: dict) -> tuple[ModuleType, Spec]:
    """The module of a method, and what is asked of it with its own defaults."""
    module = load_method(method)
    own = {name: getattr(module, name.upper(), getattr(Spec, name)) for name in ("group_size", "outliers", "steps")}
    if own["steps"] is None and options.get("rounding") is not None:
        own["steps"] = getattr(load_rounding(options["rounding"]), "STEPS", None)
    if options.get("steps") is not None and own["steps"] is None:
        raise ValueError(f"steps is {options['steps']}, but {method} does not train")
    if options.get("bits_map"):
        if not hasattr(module, "MIXED_BITS"):
            raise ValueError(f"bits_map is given, but {method} takes the same bits for all linears")
        options = options | {"bits_map": bits_map(options["bits_map"])}
    options = options | {name: value for name, value in own.items() if options.get(name) is None}
    return module, module.complete(Spec(method, **options).check())


def bits_map(value: dict) -> tuple[tuple[str, int, int | None], ...]:
    """{pattern: bits} or {pattern: {"bits": bits, "group_size": inputs}} as `Spec.bits_map`; ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"bits_map is {value!r}, expected an object of patterns and bits")
    entries = []
    for pattern, said in value.items():
        said = said if isinstance(said, dict) else {"bits": said}
        if not isinstance(pattern, str) or not {"bits"} <= said.keys() <= {"bits", "group_size"}:
            raise ValueError(f"bits_map: {pattern!r} has {said!r}, expected bits, or an object of bits and group_size")
        entries.append((pattern, said["bits"], said.get("group_size")))
    return tuple(entries)


def check_patterns(model: FloatModel, spec: Spec) -> None:
    """Raise ValueError if a pattern of the bits map is about no linear: it is misspelt."""
    names = [f"model.layers.{i}.{name}" for i in range(model.blocks) for name in model.arch.LINEARS]
    for entry in spec.bits_map:
        if all((alone := replace(spec, bits_map=(entry,))).at(name) is alone for name in names):
            raise ValueError(f"bits_map: {entry[0]!r} matches no linear of the model, which has {', '.join(names[:7])}, …")


def calibration_tokens(model: FloatModel, tokenizer: Tokenizer, spec: Spec, calib: str | os.PathLike | None, progress: Progress) -> Tensor | None:
    """i64[samples, seq_len], or None for a method that reads no text."""
    if spec.samples == 0:
        return None
    longest = model.config.max_position_embeddings
    if spec.seq_len > longest:
        raise ValueError(f"seq_len is {spec.seq_len}, but the model was made for at most {longest} positions")
    if calib is not None:
        ids = text_windows(calib, tokenizer, spec.samples, spec.seq_len, spec.seed)
    else:
        ids = self_written(model, tokenizer, spec.samples, spec.seq_len, spec.seed, progress)
    if int(ids.max()) >= model.config.vocab_size:
        raise ValueError(f"the tokenizer gives token {int(ids.max())}, but the model has only {model.config.vocab_size}")
    return ids


def announce_groups(model: FloatModel, spec: Spec) -> dict[int, int]:
    """Inputs → group size that is used, for each width in the model; says on stderr where it is not the one asked for."""
    if spec.head_bits == 8 and (group := fit_group(HEAD_GROUP, model.config.hidden_size)) != HEAD_GROUP:
        print(f"group size {HEAD_GROUP} of the output matrix does not divide {model.config.hidden_size} inputs: {group} is used there", file=sys.stderr)
    widths = sorted({model.config.linear_shape(name)[1] for name in model.arch.LINEARS})
    groups = {k: fit_group(spec.group_size, k) for k in widths}
    for k, group in groups.items():
        if spec.group_size not in (0, group):
            print(f"group size {spec.group_size} does not fit {k} inputs: {group} is used there", file=sys.stderr)
    return groups


def quantized_block(module: ModuleType, model: FloatModel, batches: Batches | None, work: Path, i: int, spec: Spec) -> dict[str, Tensor]:
    """All tensors of block i as the checkpoint holds them."""
    prefix = f"model.layers.{i}."
    weights = model.block(i)
    block = Block(i, prefix, weights, model.arch.SITES, batches.forward if batches else None, work, model.config)
    if batches:
        block.rope = batches.cos, batches.sin
        block.quantized_inputs = lambda: batches.quantized_inputs(i)
    quantized = module.quantize_block(block, (lambda: batches.inputs(i)) if batches else None, spec)
    tensors = {f"{prefix}{name}.weight": norm_tensor(model, f"{prefix}{name}.weight", weights[f"{name}.weight"]) for name in model.arch.NORMS}
    for name, q in quantized.items():
        tensors |= named(prefix + name, q.check()) if isinstance(q, QTensor) else {prefix + name: q}
    return tensors


def named(module: str, q: QTensor) -> dict[str, Tensor]:
    return {f"{module}.{key}": t for key, t in q.tensors().items()}


def outer_tensors(model: FloatModel, spec: Spec) -> dict[str, Tensor]:
    """Embedding, final norm and output matrix. A tied model has one matrix for both ends, in the form the head asks for."""
    tied = model.config.tie_word_embeddings
    tensors = {"model.norm.weight": norm_tensor(model, "model.norm.weight", model.final_norm())}
    if not tied or spec.head_bits == 16:
        tensors["model.embed_tokens.weight"] = half_if_it_fits(model.embedding())
    if spec.head_bits == 8:
        name = "model.embed_tokens" if tied else "lm_head"
        grid = Spec(bits=8, group_size=HEAD_GROUP)
        # By bands of rows: what rounding a matrix leaves lying about is several times the matrix.
        tensors |= named(name, stack([quantize_matrix(rows, grid, name=name) for rows in model.head().split(HEAD_ROWS)]).check())
    elif not tied:
        tensors["lm_head.weight"] = half_if_it_fits(model.head())
    return tensors


def half_if_it_fits(t: Tensor) -> Tensor:
    return t.half() if float(t.abs().max()) <= FLOAT16_MAX else t


def norm_tensor(model: FloatModel, name: str, value: Tensor) -> Tensor:
    """A norm's weight in the type of its source, f16 or f32; bf16 becomes f32, which holds it exactly."""
    stored = model.checkpoint.get(name)
    return value.half() if stored is not None and stored.dtype == torch.float16 else value


def output_config(source: dict, spec: Spec, calibration: str | None) -> dict:
    """config.json of the result: the source's, with what was done to it."""
    done = {"quant_method": "pyengine", "version": VERSION, **asdict(spec), "calibration": calibration}
    return {**source, "quantization_config": done}


def report(model: FloatModel, spec: Spec, sizes: dict[str, int], groups: dict[int, int], statistics: dict, seconds: dict) -> dict:
    """What was made, from the bytes that lie on the disk."""
    found = shares(model.arch, model.config, sizes)
    return {
        "method": spec.method,
        "bits_per_weight": found["bits_per_weight"],
        "outlier_share": found["outlier_share"],
        "size_bytes": sum(sizes.values()),
        "group_sizes": {str(k): group for k, group in groups.items()},
        "seconds": seconds,
        "statistics": statistics,
        "spec": asdict(spec),
    }
