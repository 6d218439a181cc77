"""What methods learn from: the float model read block by block, the token windows it is shown, and each block's inputs.

The windows come from a text file or are written by the model itself. A block's inputs come in two streams, as the float model
makes them and as the finished, quantized blocks before it do. Each is computed once, in float32, and kept in files of the work
folder that are mapped rather than read: memory stays that of one block, and the folder holds 4 bytes x hidden size x tokens
for every block ahead of the driver that a method has asked for (SmolLM2-135M, 16 x 256 tokens: 9.4 MB a block).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .. import models
from ..cache import Batch
from ..checkpoint import write_file
from ..errors import CheckpointError
from ..files import cache_folder, read_text
from ..formats import Checkpoint
from ..loader import build, weight
from ..qtensor import QTensor
from ..tokenizer import Tokenizer

CHUNK_TOKENS = 2048  # tokens that go through a block together: its widest activation stays below 100 MiB up to 7 B parameters
Progress = Callable[[Iterable, str], Iterable]


def show_progress(items: Iterable, label: str) -> Iterable:
    """`items` with a bar on stderr; one short line instead where stderr is a file or a pipe."""
    if not sys.stderr.isatty():
        print(label, file=sys.stderr, flush=True)
        return items
    from tqdm import tqdm

    return tqdm(items, desc=label, file=sys.stderr, leave=False)


@dataclass
class FloatModel:
    """The source checkpoint as float32 weights, read when asked for and never all at once."""

    checkpoint: Checkpoint
    arch: ModuleType  # models/<model_type>.py
    config: object  # its Config

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> FloatModel:
        """Raises CheckpointError if the architecture is not one of pyengine/models."""
        if checkpoint.config.get("quantization_config"):
            raise CheckpointError(f"{checkpoint.path}: the model is quantized already; give the float model it was made from")
        arch = models.find(checkpoint.config)
        return cls(checkpoint, arch, arch.Config.from_dict(checkpoint.config))

    @property
    def blocks(self) -> int:
        return self.config.num_hidden_layers

    def block(self, i: int) -> dict[str, Tensor]:
        """f32 weights and biases of block i by their name inside the block."""
        c, prefix, weights = self.config, f"model.layers.{i}", {}
        for name in self.arch.LINEARS:
            w, bias = weight(self.checkpoint, f"{prefix}.{name}", *c.linear_shape(name), c.has_bias(name))
            weights[f"{name}.weight"] = w
            if bias is not None:
                weights[f"{name}.bias"] = bias
        for name in self.arch.NORMS:
            weights[f"{name}.weight"] = self.checkpoint.float(f"{prefix}.{name}.weight", (c.hidden_size,))
        return weights

    def embedding(self) -> Tensor:
        """f32[vocab, hidden]"""
        return self.checkpoint.float("model.embed_tokens.weight", (self.config.vocab_size, self.config.hidden_size))

    def head(self) -> Tensor:
        """f32[vocab, hidden]: the output matrix, which is the embedding where the two are tied."""
        if self.config.tie_word_embeddings:
            return self.embedding()
        return self.checkpoint.float("lm_head.weight", (self.config.vocab_size, self.config.hidden_size))

    def final_norm(self) -> Tensor:
        """f32[hidden]"""
        return self.checkpoint.float("model.norm.weight", (self.config.hidden_size,))


@dataclass
class Batches:
    """The calibration windows ids i64[samples, t] and, on demand, what each block of the model sees of them."""

    model: FloatModel
    ids: Tensor
    folder: Path
    progress: Progress = show_progress
    finished: Callable[[int], dict[str, Tensor]] | None = None  # the tensors of a quantized block as the checkpoint holds them

    def __post_init__(self):
        self.cos, self.sin = self.model.arch.rope_table(self.model.config, self.ids.shape[1])

    def forward(self, weights: dict[str, Tensor], x: Tensor, hook=None, edit=None) -> Tensor:
        """x[b, t, hidden] through one block."""
        return self.model.arch.block_forward(weights, x, self.model.config, self.cos, self.sin, hook, edit)

    def inputs(self, i: int) -> Tensor:
        """f32[samples, t, hidden]: the float model's input of block i (of the final norm for i = number of blocks), mapped from a file."""
        return self._stream("inputs", i, self.model.block, nullcontext)

    def quantized_inputs(self, i: int) -> Tensor:
        """The same, as the quantized blocks before block i make it; they must be finished."""
        return self._stream("quantized", i, lambda j: stored_weights(self.model, j, self.finished(j)), fast_matmul)

    def forget(self, i: int) -> None:
        """Delete what no block from i on needs."""
        for stream in ("inputs", "quantized"):
            for j in range(i):
                self._file(stream, j).unlink(missing_ok=True)

    def _stream(self, stream: str, i: int, weights_of: Callable[[int], dict[str, Tensor]], precision: Callable) -> Tensor:
        have = next((j for j in range(i, -1, -1) if self._file(stream, j).exists()), None)
        if have is None:
            embedding = self.model.embedding()
            self._store(self._file(stream, 0), (embedding[ids] for ids in self.ids))
            have = 0
        for j in range(have, i):
            weights, x = weights_of(j), self._load(self._file(stream, j))
            with torch.no_grad(), precision():
                self._store(self._file(stream, j + 1), (self.forward(weights, part).float() for part in chunks(x)))
        return self._load(self._file(stream, i))

    def _file(self, stream: str, i: int) -> Path:
        return self.folder / f"{stream}-{i:05d}.npy"

    def _store(self, file: Path, parts: Iterable[Tensor]) -> None:
        header = io.BytesIO()
        shape = (*self.ids.shape, self.model.config.hidden_size)
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        # Written, not mapped: a full disk raises OSError here and would be a SIGBUS in a mapping.
        write_file(file, itertools.chain([header.getvalue()], (p.contiguous().numpy().data for p in parts)))

    def _load(self, file: Path) -> Tensor:
        return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))


def fast_matmul():
    """bfloat16 matrix products where the CPU has tiles for them: three to seven times as fast as float32, and far finer than what is being
    rounded to 4 bits."""
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # newer than the oldest torch we take
    return torch.autocast("cpu", torch.bfloat16) if has_tiles() else nullcontext()


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """x[samples, t, hidden] in parts of whole windows that may go through a block together."""
    return x.split(max(1, CHUNK_TOKENS // x.shape[1]))


def stored_weights(model: FloatModel, i: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """f32 weights of block i that do in float what its checkpoint tensors do, keyed as `FloatModel.block` keys them.

    A site's transform is folded back into the weights behind it; activations and the KV cache stay float.
    """
    prefix, weights = f"model.layers.{i}.", {}
    for site, names in model.arch.SITES.items():
        left, right = (tensors.get(f"{prefix}{site}.{side}") for side in ("left", "right"))
        for name in names:
            q = QTensor.read(prefix + name, *model.config.linear_shape(name), tensors.get)
            weights[f"{name}.weight"] = untransformed(q.dequantize(), left, right)
            if q.bias is not None:
                weights[f"{name}.bias"] = q.bias.float()
    return weights | {f"{name}.weight": tensors[f"{prefix}{name}.weight"].float() for name in model.arch.NORMS}


def untransformed(w: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """f32[n, k]: what multiplies x as w[n, k] multiplies left^T . mat(x) . right; left f16[a, a], right f16[b, b], absent: identity."""
    n, k = w.shape
    if left is not None:
        w = torch.einsum("ia,naj->nij", left.float(), w.view(n, left.shape[0], -1)).reshape(n, k)
    if right is not None:
        w = (w.view(n, -1, right.shape[0]) @ right.float().T).reshape(n, k)
    return w


def token_hash(ids: Tensor) -> str:
    """sha256 of the windows as little-endian int64, with their shape."""
    data = ids.to(torch.int64).contiguous().numpy().astype("<i8", copy=False)
    return hashlib.sha256(repr(tuple(ids.shape)).encode() + data.tobytes()).hexdigest()


def text_windows(path: str | os.PathLike, tokenizer: Tokenizer, samples: int, seq_len: int, seed: int) -> Tensor:
    """i64[samples, seq_len]: windows spread evenly over the text, each shifted at random (seeded) within its share of it.

    Where the tokenizer starts a text with a special token, every window starts with it too: it is what the model sees
    at position 0 in use, and that position steers attention. ValueError if the text is too short.
    """
    tokens = torch.tensor(tokenizer.encode(read_text(path), special=False), dtype=torch.int64)
    if len(tokens) < samples * seq_len:
        need = f"{samples} windows of {seq_len} need {samples * seq_len}"
        raise ValueError(f"{path}: the calibration text has {len(tokens)} tokens, {need}; use a longer text or fewer samples")
    share = len(tokens) // samples
    shift = torch.randint(0, share - seq_len + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([tokens[i * share + int(s) :][:seq_len] for i, s in enumerate(shift)])
    start = tokenizer.encode("", special=True)
    if start:
        windows[:, 0] = start[0]
    return windows


def self_written(model: FloatModel, tokenizer: Tokenizer, samples: int, seq_len: int, seed: int, progress: Progress = show_progress) -> Tensor:
    """i64[samples, seq_len]: what the float model writes by itself, at temperature 1, after a random first token.

    All sequences are sampled together with a KV cache; the float32 weights are in memory for this. The result is cached
    by the checkpoint's fingerprint, the seed and the sizes.
    """
    key = f"{model.checkpoint.fingerprint()} {seed} {samples} {seq_len}"
    file = cache_folder() / f"self-written-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    try:
        ids = np.load(file, allow_pickle=False)
        if ids.shape == (samples, seq_len) and ids.dtype == np.int64 and 0 <= ids.min() and ids.max() < model.config.vocab_size:
            return torch.from_numpy(ids)
    except (OSError, ValueError, EOFError):
        pass  # not there, or damaged: it is written again
    ids = sample_text(model.checkpoint, tokenizer, samples, seq_len, seed, progress)
    data = io.BytesIO()
    np.save(data, ids.numpy(), allow_pickle=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, (data.getvalue(),))
    except OSError as e:
        print(f"the calibration text is not kept for another time: {e}", file=sys.stderr)
    return ids


def sample_text(checkpoint: Checkpoint, tokenizer: Tokenizer, samples: int, seq_len: int, seed: int, progress: Progress) -> Tensor:
    """The sampling loop of `self_written`, without the cache. The model runs as it does for a user, all sequences in one batch."""
    model, random = build(checkpoint), torch.Generator().manual_seed(seed)
    cache, slots = model.cache(samples, seq_len), list(range(samples))
    ids = torch.empty(samples, seq_len, dtype=torch.int64)
    start = tokenizer.encode("", special=True)[:1]
    ids[:, : len(start)] = torch.tensor(start, dtype=torch.int64)
    ids[:, len(start)] = torch.randint(0, model.config.vocab_size, (samples,), generator=random)
    for t in progress(range(seq_len - 1), "the model writes its calibration text"):
        logits = model(Batch.of(ids[:, t].tolist(), slots, [t] * samples, cache), cache)
        if t >= len(start):
            # An exponential race draws from softmax(logits): the least e/p wins, which needs no normalised sums.
            race = logits - torch.empty_like(logits).exponential_(generator=random).log_()
            ids[:, t + 1] = race.argmax(1)
    return ids
