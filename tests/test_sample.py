"""The op Sample: its random numbers, its distribution, its ties and broken rows; and that CUDA kernels choose the reference's token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyengine import _C

HALF = {torch.float16: 1, torch.bfloat16: 2}


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10: counter u64[..., 4], key u64[..., 2] of 32-bit words → words u64[..., 4]."""
    c, (low, high), mask = [counter[..., i] for i in range(4)], (key[..., 0], key[..., 1]), np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ low, b & mask, (a >> np.uint64(32)) ^ c[3] ^ high, a & mask]
        low, high = low + np.uint64(0x9E3779B9) & mask, high + np.uint64(0xBB67AE85) & mask
    return np.stack(c, -1)


def race(logits: torch.Tensor, temperature: float, seed: int, position: int) -> np.ndarray:
    """What ops.h says of a row, in float64: the largest of these is drawn."""
    columns = np.arange((len(logits) + 3) // 4, dtype=np.uint64)
    counter = np.stack((columns, np.full_like(columns, position), np.zeros_like(columns), np.zeros_like(columns)), -1)
    word = philox(counter, np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint64)).reshape(-1)[: len(logits)]
    e = -np.log1p(-(word.astype(np.float64) + 0.5) / 2**32)
    return (logits.double() - logits.max()).numpy() / temperature - np.log(e)


class Rows:
    """Rows of logits with a temperature, a seed and a position each."""

    def __init__(self, logits: torch.Tensor, temperature: torch.Tensor | None = None, seed: torch.Tensor | None = None):
        m = len(logits)
        self.logits, self.temperature = logits.contiguous(), temperature
        self.seed = torch.randint(-(2**63), 2**63 - 1, (m,)) if seed is None else seed
        self.position = torch.randint(0, 2**31 - 1, (m,), dtype=torch.int32)

    def op(self, ops, dtype: int, place):
        op = ops.Sample()
        (op.m, op.n), op.stride, op.dtype = self.logits.shape, self.logits.stride(0), dtype
        op.logits, op.seed, op.position = place(self.logits), place(self.seed), place(self.position)
        op.temperature = 0 if self.temperature is None else place(self.temperature)
        return op

    def on_cpu(self) -> torch.Tensor:
        kept = self.logits = self.logits.float()
        token = torch.zeros(len(kept), dtype=torch.int64)
        op = self.op(_C, 0, lambda t: t.data_ptr())
        op.token = token.data_ptr()
        op.run(kernel="sample_reference")
        return token


def test_philox_has_the_published_vectors():
    published = (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    )
    for counter, key, words in published:
        assert philox(np.array(counter, np.uint64), np.array(key, np.uint64)).tolist() == words


def test_the_reference_draws_what_the_formula_says():
    rows = Rows(torch.randn(300, 203) * 4, torch.rand(300) * 2 + 0.05)
    for i, token in enumerate(rows.on_cpu().tolist()):
        key = race(rows.logits[i], rows.temperature[i].item(), rows.seed[i].item(), rows.position[i].item())
        assert key[token] >= key.max() - 1e-5 * (1 + np.abs(key[token]))


def test_draws_have_the_probabilities_of_the_softmax():
    count, logits, temperature = 40000, torch.tensor([1.5, 0.0, -2.0, 1.0, -torch.inf, 0.5, -1.0]), 0.7
    rows = Rows(logits.expand(count, -1), torch.full((count,), temperature), torch.full((count,), 11))
    rows.position = torch.arange(count, dtype=torch.int32)
    share, p = torch.bincount(rows.on_cpu(), minlength=7) / count, (logits / temperature).softmax(0)
    assert ((share - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all()


def edge_cases(dtype: torch.dtype) -> tuple[Rows, torch.Tensor]:
    """Rows with ties, broken values and temperatures that leave one token; and their tokens."""
    nan, inf = torch.nan, torch.inf
    logits = torch.randn(12, 24).to(dtype)
    logits[0, [3, 17, 20]], logits[1, 23], logits[2, 5], logits[3], logits[4, 5:], logits[5, 7] = 9.0, nan, inf, -inf, -inf, 9.0
    logits[6, 0], logits[7] = -nan, 2.0
    logits[8:12] = logits[8]
    logits[8:12, 11] = 9.0
    temperature = torch.tensor([0.0, 0, 0, 0, 0, 1e-30, 1, 0, 1e-38, 0, 1e-6, 0])
    return Rows(logits, temperature), torch.tensor([3, -1, -1, -1, logits[4, :5].float().argmax(), 7, -1, 0, 11, 11, 11, 11])


def test_edges_on_the_cpu():
    rows, token = edge_cases(torch.float32)
    assert torch.equal(rows.on_cpu(), token)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_cuda_chooses_the_token_of_the_reference(device, dtype):
    cases = [edge_cases(dtype)[0]]
    for m, n in ((3, 8), (2, 101), (4, 4096), (2, 9000)):
        logits = torch.full((m, (n + 7) // 8 * 8), torch.nan, dtype=dtype)  # beyond the n of a row nothing is read
        logits[:, :n] = (torch.randn(m, n) * 3).to(dtype)
        cases.append(Rows(logits, torch.tensor([0.8, 0, 3.0, 1e-3])[:m]))
        cases[-1].n = n
    cases.append(Rows(torch.randn(2, 64).to(dtype)))
    expected = []
    for rows in cases:
        n = getattr(rows, "n", rows.logits.shape[1])
        cpu = Rows(rows.logits[:, :n].float(), rows.temperature, rows.seed)
        cpu.position = rows.position
        expected.append(cpu.on_cpu())
    for schedule in device.schedules(seeds=1):
        for case, rows in enumerate(cases):
            to_device = lambda t: device.array(t.view(torch.uint8).numpy() if t.dtype == torch.bfloat16 else t.numpy()).ptr  # noqa: E731
            op, token = rows.op(device.ops, HALF[dtype], to_device), device.empty((len(rows.logits),), np.int64, "token")
            op.n, op.token = getattr(rows, "n", op.n), token.ptr
            op.run(stream=device.stream, kernel="sample_sm80")
            assert token.numpy().tolist() == expected[case].tolist(), (case, schedule)
