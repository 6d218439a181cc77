"""Every linear its own form, chosen so that the file has `target_bits` bits a weight and the loss grows least.

A form is a number of bits, a group size and a share of FP16 outliers. What a form costs is counted in bytes of the file, with scales and
indices; what it loses is the second-order estimate of the loss that the outliers of `gwq` are ranked by: the sum of g^2 (w - Q(w))^2 over
the weights that it rounds, g the gradients of the calibration samples. One backward pass serves all forms. From the cheapest form of each
linear on, the step that gains most a byte is taken until the bytes are spent; steps of one linear are those of its convex hull, so that
each is worth less than the one before. Codes of 2 and 3 bits lie in files as 4 do, so that no form has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import write_file
from ..qtensor import GROUPS, QTensor, fit_group
from . import rounding
from .calibration import Batches, FloatModel
from .common import Block, Spec, rounding_error
from .gwq import SAMPLES, SEQ_LEN, backward, gradient_batches, load, save

SHARES = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04)  # of outliers, where codes have 4 bits
CHOICE = "forms.json"


@dataclass(frozen=True)
class Form:
    """How one linear may be stored, what of the file it takes and what of the loss it is thought to cost."""

    bits: int
    group: int
    share: float
    size: int = 0  # bytes
    lost: float = 0.0


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults; ValueError without target_bits."""
    if spec.target_bits is None:
        raise ValueError("method auto needs target_bits, the bits per weight that its choice may take (4.6, say)")
    return rounding.complete(replace(spec, outliers=0.0, score="fisher_dw2", scope="tensor"), "rtn", SAMPLES, SEQ_LEN)


def forms(w: Tensor, fisher: Tensor, spec: Spec) -> tuple[list[Form], dict[int, Tensor]]:
    """All forms of f32 w[n, k] with the sum of squared gradients f32[n, k]; and by group the places of its outliers, i64, most lost first."""
    (n, k), found, places = w.shape, [], {}
    for bits, group in dict.fromkeys([*((4, fit_group(g, k)) for g in GROUPS), (8, fit_group(spec.group_size, k))]):
        lost = (fisher * rounding_error(w, replace(spec, bits=bits, group_size=group)).square()).flatten()
        shares = SHARES if bits == 4 else (0.0,)
        top, order = lost.sort(descending=True, stable=True)
        taken = torch.cat((torch.zeros(1, dtype=torch.float64), top[: int(max(shares) * n * k)].double().cumsum(0)))
        total, dense = float(lost.sum(dtype=torch.float64)), n * -(-k * bits // 8) + n * (k // group) * (2 if spec.symmetric else 3)
        for share in shares:
            count = int(share * n * k)
            sparse = 4 * (n + 1) + count * (4 if k <= 65536 else 6) if count else 0
            found.append(Form(bits, group, share, dense + sparse, total - float(taken[count])))
        if bits == 4:
            places[group] = order[: int(max(shares) * n * k)].int()
    return found, places


def hull(found: list[Form]) -> list[Form]:
    """The forms from the cheapest on that no mix of two others beats: of ascending size, each step gaining less a byte than the one before."""
    kept: list[Form] = []
    for form in sorted(found, key=lambda f: (f.size, f.lost)):
        if kept and form.lost >= kept[-1].lost:
            continue
        while len(kept) > 1 and gain(kept[-2], kept[-1]) <= gain(kept[-1], form):
            kept.pop()
        kept.append(form)
    return kept


def gain(a: Form, b: Form) -> float:
    """What the step from a to b wins for each byte."""
    return (a.lost - b.lost) / (b.size - a.size) if b.size > a.size else float("inf")


def allocate(choices: dict[str, list[Form]], budget: float) -> dict[str, Form]:
    """One of the forms of each linear, all together of at most `budget` bytes. ValueError if the smallest ones take more."""
    hulls = {name: hull(found) for name, found in choices.items()}
    chosen = {name: kept[0] for name, kept in hulls.items()}
    left = budget - sum(form.size for form in chosen.values())
    if left < 0:
        raise ValueError(f"target_bits asks for {budget:.0f} bytes, but the smallest forms take {budget - left:.0f}")
    steps = sorted((-gain(a, b), name, i + 1) for name, kept in hulls.items() for i, (a, b) in enumerate(zip(kept, kept[1:])))
    for _, name, i in steps:
        step = hulls[name][i].size - chosen[name].size
        if chosen[name] is hulls[name][i - 1] and step <= left:  # a step that did not fit ends those of its linear
            chosen[name], left = hulls[name][i], left - step
    return chosen


def prepare(model: FloatModel, batches: Batches, spec: Spec) -> dict:
    """Choose the form of every linear and leave it, with the places of outliers, in `batches.folder`."""
    folder, arch = batches.folder, model.arch
    for i, weights, statistics in backward(model, gradient_batches(batches, spec), folder, spec.score):
        found = {}
        for name, fisher in statistics.items():
            found[name], places = forms(weights[f"{name}.weight"], fisher, spec)
            for group, place in places.items():
                save(_places_file(folder, i, name, group), place)
        _write(folder / f"forms-{i:05d}.json", found)
    choices, biases = {}, 0
    for i in range(model.blocks):
        for name, found in json.loads((folder / f"forms-{i:05d}.json").read_text()).items():
            choices[f"model.layers.{i}.{name}"] = [Form(**form) for form in found]
            biases += 2 * model.config.linear_shape(name)[0] if model.config.has_bias(name) else 0
    weights = model.blocks * sum(n * k for n, k in map(model.config.linear_shape, arch.LINEARS))
    chosen = allocate(choices, spec.target_bits * weights / 8 - biases)
    _write(folder / CHOICE, {name: [form] for name, form in chosen.items()})
    return {"calibration_loss": float(load(folder / "loss.npy").mean()), "forms": count_forms(chosen)}


def count_forms(chosen: dict[str, Form]) -> dict[str, int]:
    """How many linears have each form, the most frequent first."""
    names = [f"{form.bits} bits, groups of {form.group}, {100 * form.share:g} % outliers" for form in chosen.values()]
    return {name: names.count(name) for name in sorted(set(names), key=lambda name: (-names.count(name), name))}


def quantize_block(block: Block, inputs: Callable[[], Tensor], spec: Spec) -> dict[str, QTensor]:
    """The quantized linears of one block by name, in the forms that `prepare` chose."""
    chosen = json.loads((block.folder / CHOICE).read_text())
    masks, said = {}, []
    for name in block.linears:
        form, w = Form(**chosen[block.prefix + name][0]), block.weights[f"{name}.weight"]
        said.append((block.prefix + name, form.bits, form.group if form.group < w.shape[1] else 0))
        if count := int(form.share * w.numel()):
            masks[name] = torch.zeros(w.shape, dtype=torch.bool)
            masks[name].view(-1)[load(_places_file(block.folder, block.index, name, form.group))[:count].long()] = True
    return rounding.round_block(block, inputs, replace(spec, bits_map=tuple(said)), masks)


def _places_file(folder: Path, i: int, name: str, group: int) -> Path:
    return folder / f"places-{i:05d}-{name}-{group}.npy"


def _write(file: Path, found: dict[str, list[Form]]) -> None:
    write_file(file, (json.dumps({name: [vars(form) for form in of] for name, of in found.items()}).encode(),))
