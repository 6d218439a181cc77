"""Where outliers lie: each scope against brute force, and the model-wide one without all scores at once."""

import pytest
import torch

from pyengine.quant.common import Spec, quantize_matrix
from pyengine.quant.outliers import Best, choose, count_of, mask_of

SITES = {"in": ("a", "b"), "out": ("c",)}


def scores(levels: int) -> dict[str, torch.Tensor]:
    return {name: torch.randint(0, levels, shape).float() for name, shape in {"a": (6, 50), "b": (3, 50), "c": (5, 97)}.items()}


def best(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


@pytest.mark.parametrize("levels", (1, 3, 1000))
@pytest.mark.parametrize("share", (0.0, 0.005, 0.03, 0.5))
def test_rows_and_runs_of_rows(levels, share):
    found = scores(levels)
    for scope in ("row", "structured"):
        kept = choose(found, SITES, Spec(outliers=share, scope=scope))
        for name, score in found.items():
            n, k = score.shape
            count = count_of(share, k)
            assert count == (0 if share == 0 else max(1, round(share * k)))
            runs = [(0, k)] if scope == "row" else [(i * k // count, (i + 1) * k // count) for i in range(count)]
            each = count if scope == "row" else 1
            want = [j * k + a + c for j in range(n) for a, b in runs for c in best(score[j, a:b].tolist(), each)]
            assert kept[name].tolist() == want


@pytest.mark.parametrize("levels", (1, 3, 1000))
def test_columns_are_those_of_a_site(levels):
    found = scores(levels)
    kept = choose(found, SITES, Spec(outliers=0.1, scope="columns"))
    assert kept["a"].tolist() == kept["b"].tolist() == best((found["a"].sum(0) + found["b"].sum(0)).tolist(), 5)
    assert kept["c"].tolist() == best(found["c"].sum(0).tolist(), 10)


@pytest.mark.parametrize("levels", (1, 3, 1000))
@pytest.mark.parametrize("count", (0, 1, 30, 400, 935))
def test_the_best_of_all_matrices_in_any_order(levels, count):
    found = list(scores(levels).values())
    want = best(torch.cat([s.flatten() for s in found]).tolist(), count)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        running, candidates = Best(count), {}
        for i in order:
            candidates[i] = running.add(found[i])
        assert not count or len(candidates[order[-1]][0]) < found[order[-1]].numel() or levels < 1000 or count > 300  # few of the last
        resumed = Best(count)
        for i in (0, 1, 2):
            resumed.see(candidates[i])
        for done in (running, resumed):
            kept = done.trim([candidates[i] for i in (0, 1, 2)])
            assert torch.cat([p + start for p, start in zip(kept, (0, 300, 450))]).tolist() == want


def test_columns_do_not_stretch_the_grid_and_hold_their_weights():
    w = torch.randn(8, 64)
    w[:, 5], w[:, 40] = 1000, -1000
    columns = torch.tensor([5, 40])
    for bits, symmetric in ((4, True), (4, False), (8, True), (3, False)):
        spec = Spec(bits=bits, group_size=32, symmetric=symmetric, scope="columns")
        q = quantize_matrix(w, spec, mask_of(columns, w.shape, spec)).check(8)
        assert torch.equal(q.dequantize()[:, columns], w[:, columns]) and q.outliers == 0 and q.columns == 2
        assert float((q.dequantize() - w).abs().max()) < 4
    assert quantize_matrix(w, spec, mask_of(columns[:0], w.shape, spec)).check(8).columns == 0
