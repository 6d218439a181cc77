"""GWQ (arXiv 2411.00850): keep the weights that the loss is most sensitive to in float16, round the rest, as GPTQ does if nothing else is asked for.

The paper ranks weights by |gradient| of one sample. `score` names what ranks them here, in each matrix by itself:

    abs_g       sum_s |g_s|                 the paper's statistic
    sq_g        sum_s g_s^2                 the diagonal of the empirical Fisher matrix
    abs_g_dw    sum_s |g_s| * |w - Q(w)|    first-order estimate of the loss that rounding costs
    fisher_dw2  sum_s g_s^2 * (w - Q(w))^2  second-order estimate of the same; the default
    hdiag_dw2   sum_t x_t^2 * (w - Q(w))^2  the layer's output error instead of the loss: needs no backward pass
    abs_w       |w|                         needs no text

Q(w) is what the rounding that follows makes of the matrix when it keeps no weight back, or a draft of it from some of the windows: to
nearest, or with the corrections of GPTQ and its kin, which move some weights further than a step and others not at all. g_s is the
gradient of the mean next-token cross-entropy of sample s; the absolute value or square is taken before the sum, because gradients of
different samples cancel.
`scope` says where a score's best are looked for (quant/outliers.py): in the whole model if the score estimates the loss, else in
each matrix by itself. The gradient walk holds one block: a forward pass leaves every block's inputs in files, then blocks are
recomputed from last to first. Each leaves its mask and the gradient of its inputs, both renamed into place, so that a run that was
cut short continues at the block it was in.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import write_file
from ..qtensor import QTensor
from . import rounding
from .calibration import Batches, FloatModel, fast_matmul
from .common import Block, Spec, rounding_error
from .merge import visit_inputs
from .outliers import Best, choose, mask_of

MIXED_BITS = True
GRADIENT_SCORES = ("abs_g", "sq_g", "abs_g_dw", "fisher_dw2")
SAMPLES, SEQ_LEN = 16, 256
DRAFT_SAMPLES = 8  # of these, from which a rounding learns what errors it will make
HEAD_TOKENS = 256  # rows of logits held at once: 256 x 128k vocabulary x 4 B = 128 MiB


def complete(spec: Spec) -> Spec:
    """`spec` with this method's defaults, and no samples where no text is needed.

    The gradients take 16 x 256: on SmolLM2-135M, with the rest rounded to nearest, the perplexity gap to float closed by 65.2 %
    with 16 x 512 tokens, 66.2 % with 16 x 256, 64.1 % with 16 x 128, so that more text buys nothing but time. Outliers of the whole
    model closed 71.9 % of it, those of each matrix 66.4 %, of rows 59.4 %, of runs 56.1 %; 2 % whole columns, which take fewer bytes,
    64.7 % (4 windows of 2048 tokens).
    """
    score = spec.score or ("hdiag_dw2" if spec.scope == "columns" else "fisher_dw2")
    scope = spec.scope or ("global" if score in GRADIENT_SCORES else "tensor")
    if scope == "global" and score not in GRADIENT_SCORES:
        raise ValueError(f"score is {score!r}, which does not compare across matrices; scope 'global' takes {', '.join(GRADIENT_SCORES)}")
    spec = replace(spec, score=score, scope=scope)
    return rounding.complete(spec) if score == "abs_w" else rounding.complete(spec, "gptq", SAMPLES, SEQ_LEN)


def gradient_batches(batches: Batches, spec: Spec) -> Batches:
    """The windows whose gradients are taken: all, but no more than they need of those that the rounding asked for."""
    if spec.rounding == "rtn":
        return batches
    folder = batches.folder / "gradient"
    folder.mkdir(exist_ok=True)
    return replace(batches, ids=batches.ids[:SAMPLES, :SEQ_LEN], folder=folder)


def prepare(model: FloatModel, batches: Batches, spec: Spec) -> dict:
    """Choose every block's outliers by loss gradients and leave the masks in `batches.folder`; returns statistics.

    Does nothing for scores without gradients; those are chosen in `quantize_block`.
    """
    if spec.score not in GRADIENT_SCORES:
        return {}
    folder, count = batches.folder, model.blocks
    batches = gradient_batches(batches, spec)
    best = Best(int(spec.outliers * count * sum(math.prod(model.config.linear_shape(name)) for name in model.arch.LINEARS)))
    if spec.scope == "global":
        for i, name in itertools.product(range(blocks_left(folder, count), count), model.arch.LINEARS):
            best.see(load(_candidates_file(folder, i, name)))
    for i, weights, statistics in backward(model, batches, folder, spec.score):
        block = Block(i, f"model.layers.{i}.", weights, model.arch.SITES, batches.forward, folder, model.config, (batches.cos, batches.sin))
        block.quantized_inputs = inputs = partial(draft_inputs, batches, i)  # no block before is quantized yet
        scores = sensitivities(block, statistics, inputs, spec)
        if spec.scope == "global":
            for name, score in scores.items():
                save(_candidates_file(folder, i, name), best.add(score))
        else:
            for name, kept in choose(scores, model.arch.SITES, spec).items():
                save(_kept_file(folder, i, name), kept)
    if spec.scope == "global":
        places = list(itertools.product(range(count), model.arch.LINEARS))
        for place, kept in zip(places, best.trim([load(_candidates_file(folder, *place)) for place in places]), strict=True):
            save(_kept_file(folder, *place), kept)
    return {"calibration_loss": float(load(folder / "loss.npy").mean())}


def draft_inputs(batches: Batches, i: int) -> Tensor:
    """f32[s, t, hidden]: what block i reads of some of the windows."""
    return batches.inputs(i)[:DRAFT_SAMPLES]


def backward(model: FloatModel, batches: Batches, folder: Path, score: str) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
    """(index, weights, statistics as of `block_statistics`) of each block from last to first.

    Continues at the block that an earlier run was in when it was cut short: one is finished when the next is asked for.
    """
    count = model.blocks
    todo = blocks_left(folder, count)
    if todo == count and not _gradient_file(folder, count).exists():
        for i in batches.progress(range(1, count + 1), "forward pass over the calibration windows"):
            batches.inputs(i)
        loss, gradient = loss_gradient(model, batches)
        save(folder / "loss.npy", loss)
        save(_gradient_file(folder, count), gradient)
    gradient = load(_gradient_file(folder, todo)) if todo else None
    for i in batches.progress(range(todo - 1, -1, -1), "backward pass, block by block"):
        weights = model.block(i)
        statistics = block_statistics(batches, weights, model.arch.LINEARS, batches.inputs(i), gradient, score)
        yield i, {name: w.detach() for name, w in weights.items()}, statistics
        save(_gradient_file(folder, i), gradient)
        _gradient_file(folder, i + 1).unlink()


def blocks_left(folder: Path, count: int) -> int:
    """How many blocks of `count`, from the first on, the backward pass has not finished."""
    return next((i for i in range(count + 1) if _gradient_file(folder, i).exists()), count)


def loss_gradient(model: FloatModel, batches: Batches) -> tuple[Tensor, Tensor]:
    """(mean next-token cross-entropy of each sample f32[s], its gradient in the last block's output f32[s, t, hidden])."""
    norm, head = model.final_norm(), model.head()
    hidden, ids = batches.inputs(model.blocks), batches.ids
    samples, t = ids.shape
    gradient, losses = torch.zeros(hidden.shape), torch.zeros(samples)
    for s in batches.progress(range(samples), "loss of each window"):
        for a in range(0, t - 1, HEAD_TOKENS):
            b = min(a + HEAD_TOKENS, t - 1)
            x = hidden[s, a:b].clone().requires_grad_()
            logits = F.linear(model.arch.rms_norm(x, norm, model.config.rms_norm_eps), head)
            loss = F.cross_entropy(logits, ids[s, a + 1 : b + 1], reduction="sum") / (t - 1)
            (gradient[s, a:b],) = torch.autograd.grad(loss, x)
            losses[s] += loss.detach()
    return losses, gradient


def block_statistics(
    batches: Batches, weights: dict[str, Tensor], linears: tuple[str, ...], inputs: Tensor, gradient: Tensor, score: str
) -> dict[str, Tensor]:
    """Sum over samples of |g| or g^2 for each linear's weight, f32[n, k] by name.

    `gradient` f32[s, t, hidden] enters as that of the block's output and leaves as that of its input.
    """
    leaves = [weights[f"{name}.weight"].requires_grad_() for name in linears]
    totals = [torch.zeros_like(w) for w in leaves]
    for s in range(len(inputs)):
        x = inputs[s : s + 1].clone().requires_grad_()
        with fast_matmul():
            y = batches.forward(weights, x).float()
        grads = torch.autograd.grad(y, [x, *leaves], gradient[s : s + 1])
        gradient[s] = grads[0][0]
        for total, g in zip(totals, grads[1:], strict=True):
            if score.startswith("abs_g"):
                total.add_(g.abs())
            else:
                total.addcmul_(g, g)
    return dict(zip(linears, totals, strict=True))


def input_squares(block: Block, inputs: Tensor) -> dict[str, Tensor]:
    """sum_t x_t^2 of each linear's input, f32[k] by name.

    The first token is left out: as the attention sink its activations are orders of magnitude larger than any
    other's and would choose the outliers alone.
    """
    totals: dict[str, Tensor] = {}

    def see(site: str, x: Tensor) -> None:
        square = x[:, 1:].square().sum((0, 1))
        for name in block.sites[site]:
            totals[name] = totals.get(name, 0) + square

    visit_inputs(block, inputs, see)
    return totals


def sensitivities(block: Block, statistics: dict[str, Tensor], inputs: Callable[[], Tensor] | None, spec: Spec) -> dict[str, Tensor]:
    """f32[n, k] by name: how much is lost by rounding each weight. Statistics are f32[n, k], f32[k] (hdiag_dw2) or none (abs_w)."""
    errors = rounding_errors(block, inputs, spec) if "dw" in spec.score else {}
    scores = {}
    for name in block.linears:
        w, error = block.weights[f"{name}.weight"], errors.get(name)
        if spec.score == "abs_w":
            scores[name] = w.abs()
        elif spec.score in ("abs_g", "sq_g"):
            scores[name] = statistics[name]
        else:
            scores[name] = statistics[name] * (error.abs() if spec.score == "abs_g_dw" else error.square())
    return scores


def rounding_errors(block: Block, inputs: Callable[[], Tensor] | None, spec: Spec) -> dict[str, Tensor]:
    """w - Q(w) of each linear, f32[n, k] by name.

    A rounding that learns a whole block at once would take as long again for this: rounding to nearest stands in for it.
    """
    weights = {name: block.weights[f"{name}.weight"] for name in block.linears}
    if spec.rounding == "rtn" or not hasattr(rounding.load_rounding(spec.rounding), "round_matrix"):
        return {name: rounding_error(w, spec.at(block.prefix + name)) for name, w in weights.items()}
    rounded = rounding.round_block(replace(block, notes={}), inputs, spec, draft=True)
    return {name: w - rounded[name].dequantize() for name, w in weights.items()}


def quantize_block(block: Block, inputs: Callable[[], Tensor] | None, spec: Spec) -> dict[str, QTensor]:
    """The quantized linears of one block by name. `inputs()` are the block's float inputs f32[s, t, hidden]."""
    if spec.score in GRADIENT_SCORES:
        kept = {name: load(_kept_file(block.folder, block.index, name)) for name in block.linears}
    else:
        statistics = input_squares(block, inputs()) if spec.score == "hdiag_dw2" else {}
        kept = choose(sensitivities(block, statistics, inputs, spec), block.sites, spec)
    masks = {name: mask_of(kept[name], block.weights[f"{name}.weight"].shape, spec) for name in block.linears}
    return rounding.round_block(block, inputs, spec, masks)


def _kept_file(folder: Path, i: int, name: str) -> Path:
    """What stays float16 of a linear, as `choose` returns it."""
    return folder / f"mask-{i:05d}-{name}.npy"


def _candidates_file(folder: Path, i: int, name: str) -> Path:
    """What of a linear may be among the best of the whole model."""
    return folder / f"candidates-{i:05d}-{name}.npy"


def _gradient_file(folder: Path, i: int) -> Path:
    """The gradient of the loss in the input of block i."""
    return folder / f"gradient-{i:05d}.npy"


def save(path: Path, t: Tensor) -> None:
    """A note in a method's folder: all of it, or nothing under that name."""
    data = io.BytesIO()
    np.save(data, t.numpy(), allow_pickle=False)
    write_file(path, (data.getvalue(),))


def load(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))
