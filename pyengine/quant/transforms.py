"""Changes of basis: the Kronecker product of two small matrices on a row of k = a·b numbers, and how such a matrix is made and learned.

    x·(left ⊗ right)  is  leftᵀ · mat(x) · right,  with mat(x) row-major a × b

costs k·(a + b) multiplications a token instead of k². A layer y = x·Wᵀ stays what it was when its weight becomes
W·(left⁻ᵀ ⊗ right⁻ᵀ), because kron(x, P)·kron(W, P⁻ᵀ)ᵀ = x·P·P⁻¹·Wᵀ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..transforms import LARGEST


def balanced_pair(k: int) -> tuple[int, int]:
    """(a, b) with a·b = k, as near to each other as there are, both ≤ 256; b even if one of the two is. ValueError if k has no such factors."""
    a = next((a for a in range(math.isqrt(k), 0, -1) if k % a == 0), 1)
    b = k // a
    if b > LARGEST:
        raise ValueError(f"{k} inputs have no two factors up to {LARGEST}, which a Kronecker transform needs (the nearest are {a} × {b})")
    return (b, a) if b % 2 and a % 2 == 0 else (a, b)


def kron(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """x[..., a·b] · (left[a, a] ⊗ right[b, b]) in x's shape; a factor that is None is the identity."""
    shape = x.shape
    if right is not None:
        x = x.reshape(-1, right.shape[0]) @ right
    if left is not None:
        x = left.mT @ x.reshape(-1, left.shape[0], shape[-1] // left.shape[0])
    return x.reshape(shape)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """f64[n, n], uniform over the rotations and reflections: the QR factor of a Gaussian matrix, its signs fixed."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def hadamard(n: int) -> Tensor | None:
    """f64[n, n] of ±1 with orthogonal rows, by Sylvester's doubling and Paley's two constructions over primes; None where those give none.

    Up to 256 those are 1, 2 and every multiple of 4 but 52, 92, 100, 116, 156, 172, 184, 188, 232, 236 and 244.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n > 2 and n % 4 or n % 2:
        return None
    if n & (n - 1) and _prime(n - 1):
        return _paley(n - 1)
    if n & (n - 1) and _prime(n // 2 - 1) and n // 2 % 4 == 2:
        return _paley(n // 2 - 1)
    half = hadamard(n // 2)
    return None if half is None else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)


def _prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _paley(q: int) -> Tensor:
    """For a prime q: q + 1 rows where q = 3 mod 4, 2·(q + 1) where q = 1 mod 4, from which differences mod q are squares."""
    squares = {x * x % q for x in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)], dtype=torch.float64)
    i = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[1:, 1:] = character[(i[:, None] - i[None, :]) % q]
    core[0, 1:], core[1:, 0] = 1, 1 if q % 4 == 1 else -1
    one = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        return core + one
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(core, plus.double()) + torch.kron(one, minus.double())


def flat_rotation(n: int, generator: torch.Generator) -> Tensor:
    """f64[n, n] orthogonal: a normalised Hadamard matrix, which spreads any single entry evenly; where there is none, a random rotation."""
    h = hadamard(n)
    return random_orthogonal(n, generator) if h is None else h / math.sqrt(n)


class DirectMatrix(nn.Module):
    """A free invertible matrix that starts as `start` f64[n, n]; its inverse is taken in float64 and differentiated through."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.matrix = nn.Parameter(start.float())

    def forward(self) -> tuple[Tensor, Tensor]:
        """(P, P⁻ᵀ), each f32[n, n]."""
        return self.matrix, torch.linalg.inv(self.matrix.double()).mT.float()


class CayleyMatrix(nn.Module):
    """P = start · U · diag(s) · Vᵀ with U and V Cayley maps of free skew matrices, all starting at the identity. No inverse of P is needed."""

    def __init__(self, start: Tensor):
        super().__init__()
        n = start.shape[0]
        self.register_buffer("start", start.float())
        self.skew_u, self.skew_v = (nn.Parameter(torch.zeros(n, n)) for _ in range(2))
        self.singular = nn.Parameter(torch.ones(n))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(P, P⁻ᵀ), each f32[n, n]; `start` must be orthogonal."""
        u, v = self.start @ _cayley(self.skew_u), _cayley(self.skew_v)
        return u * self.singular @ v.mT, u / self.singular @ v.mT


def _cayley(z: Tensor) -> Tensor:
    """(I − A/2)⁻¹ · (I + A/2), orthogonal, of the skew A that z's lower triangle holds."""
    a = (z.tril(-1) - z.tril(-1).mT) / 2
    one = torch.eye(len(z))
    return torch.linalg.solve(one - a, one + a)


PARAMETRISATIONS = {"direct": DirectMatrix, "cayley": CayleyMatrix}


def key(name: str) -> str:
    """A module's or parameter's name for a tensor's: torch forbids dots there."""
    return name.replace(".", "__")
