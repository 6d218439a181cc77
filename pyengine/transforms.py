"""Changes of basis in front of quantized linears, as FlatQuant and QuaRot make them: read from a checkpoint, checked, and run.

A block's checkpoint may hold, under `model.layers.{i}.`:

    <site>.left   f16[a, a]   for each site that linears share (`SITES` of a model's file): its input becomes leftᵀ · mat(x)[a, b] · right,
    <site>.right  f16[b, b]   a·b = k; where one of the two is absent it is the identity, whose size follows from k
    <site>.clip   f32[2]      upper and lower ratio of the range of activations that are quantized, in (0, 1]
    self_attn.q_transform, self_attn.k_transform   f16[head_dim, head_dim]: every head of q and k is multiplied by them after RoPE
    self_attn.k_clip, self_attn.v_clip             f32[2]: the same ratios for keys and values in a cache of 4 bits

The weights hold the inverses already; nothing here depends on how the matrices came about.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import memory, ops
from .errors import CheckpointError
from .formats import Checkpoint

LARGEST = 256  # of a factor that the kernels take


@dataclass
class Transform:
    """leftᵀ · mat(x)[a, b] · right of every token: left f32[a, a], right f32[b, b], one of them None for the identity."""

    a: int
    b: int
    left: Tensor | None
    right: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes in a checkpoint, which holds f16."""
        return sum(2 * t.numel() for t in (self.left, self.right) if t is not None)


@dataclass
class SiteInput:
    """What the linears of a site read of its raw input: RMSNorm where there is a weight f32[k], then the change of basis if any, and of that
    codes of `bits` 8 or 4 within `clip` f32[2] where the linears multiply them. Some of these may still need the numbers themselves (`both`).

    `exact` keeps to f32 where bf16 would be quicker.
    """

    transform: Transform | None
    norm: Tensor | None = None
    eps: float = 0.0
    bits: int = 16
    clip: Tensor | None = None
    both: bool = False
    exact: bool = False

    def __call__(self, x: Tensor, room: Room, program: ops.Program | None = None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x f32[m, k] → (f32[m, k], codes): in `room`, or x itself where nothing is done to it. Beside codes the first is for `both` alone."""
        t, (m, k) = self.transform, x.shape
        if t is not None:
            out, codes = room.floats(m, k), room.codes(m, k, self.bits)
            ops.transform(
                x, t.a, t.b, left=t.left, right=t.right, weight=self.norm, eps=self.eps, exact=self.exact,
                codes=codes, bits=self.bits, clip=self.clip, out=out if codes is None or self.both else None, program=program,
            )  # fmt: skip
            return out, codes
        return (x if self.norm is None else ops.rms_norm(x, self.norm, self.eps, out=room.floats(m, k), program=program)), None


class Room:
    """Where a site puts what it makes of up to m rows of up to k values, in room f32[size(m, k)]."""

    def __init__(self, room: Tensor, m: int, k: int):
        self._float, code, self._scale = room.split((m * k, (m * k + 3) // 4, m))
        self._code = code.view(torch.uint8)

    @staticmethod
    def size(m: int, k: int) -> int:
        return m * k + (m * k + 3) // 4 + m

    def floats(self, m: int, k: int) -> Tensor:
        return self._float[: m * k].view(m, k)

    def codes(self, m: int, k: int, bits: int) -> tuple[Tensor, Tensor] | None:
        """Of 8 bits i8[m, k] or of 4 u8[m, k/2], and their scales f32[m]; None for 16, and where a code of 4 bits would be left alone."""
        if bits == 16 or bits == 4 and k % 2:
            return None
        code = self._code[: m * k * bits // 8].view(m, -1)
        return code.view(torch.int8) if bits == 8 else code, self._scale[:m]


@dataclass
class HeadBasis:
    """What attention does to q, k and v beside RoPE: (q_transform, k_transform) f32[head_dim, head_dim] or None, and the clips f32[2] or None."""

    basis: tuple[Tensor, Tensor] | None = None
    clip: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def nbytes(self) -> int:
        """Bytes of the basis in a checkpoint, which holds f16."""
        return sum(2 * t.numel() for t in self.basis or ())


def read_site(checkpoint: Checkpoint, name: str, k: int) -> tuple[Transform | None, Tensor | None]:
    """(transform, clip f32[2]) of a site `model.layers.{i}.<site>` with k inputs, None where absent. CheckpointError if they cannot be right."""
    left, right = (_square(checkpoint, f"{name}.{side}") for side in ("left", "right"))
    clip = _clip(checkpoint, f"{name}.clip")
    if left is None and right is None:
        return None, clip
    a = left.shape[0] if left is not None else k // right.shape[0]
    b = right.shape[0] if right is not None else k // a
    if a * b != k:
        shapes = " and ".join(f"{side} {list(t.shape)}" for side, t in (("left", left), ("right", right)) if t is not None)
        raise CheckpointError(f"{name}: {shapes} cannot change the basis of {k} inputs")
    if max(a, b) > LARGEST:
        raise CheckpointError(f"{name}: a factor of {a} × {b} is above {LARGEST}, the largest that these kernels take")
    return Transform(a, b, left, right), clip


def read_heads(checkpoint: Checkpoint, name: str, head_dim: int) -> HeadBasis:
    """Of the attention `model.layers.{i}.self_attn`. CheckpointError if it cannot be right."""
    names = [f"{name}.{which}_transform" for which in "qk"]
    q, k = (_square(checkpoint, each) for each in names)
    if (q is None) != (k is None):
        raise CheckpointError(f"{names[q is not None]}: missing, but {names[q is None]} is there: only both leave the attention as it was")
    for each, t in zip(names, (q, k)):
        if t is not None and t.shape[0] != head_dim:
            raise CheckpointError(f"{each}: shape {list(t.shape)}, expected [{head_dim}, {head_dim}]")
    return HeadBasis(None if q is None else (q, k), (_clip(checkpoint, f"{name}.k_clip"), _clip(checkpoint, f"{name}.v_clip")))


def _square(checkpoint: Checkpoint, name: str) -> Tensor | None:
    stored = checkpoint.get(name)
    if stored is None:
        return None
    if stored.dtype != torch.float16:
        raise CheckpointError(f"{name}: dtype {str(stored.dtype)[6:]}, expected float16")
    if stored.dim() != 2 or stored.shape[0] != stored.shape[1] or not stored.shape[0]:
        raise CheckpointError(f"{name}: shape {list(stored.shape)}, expected a square matrix")
    return memory.pack(checkpoint.float(name, tuple(stored.shape)))


def _clip(checkpoint: Checkpoint, name: str) -> Tensor | None:
    stored = checkpoint.get(name)
    if stored is None:
        return None
    if stored.dtype != torch.float32 or tuple(stored.shape) != (2,):
        raise CheckpointError(f"{name}: {str(stored.dtype)[6:]}{list(stored.shape)}, expected float32[2]")
    if not ((stored > 0) & (stored <= 1)).all():
        raise CheckpointError(f"{name}: {stored.tolist()}, expected two ratios above 0 and at most 1")
    return memory.pack(stored)
