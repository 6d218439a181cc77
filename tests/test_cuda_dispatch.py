"""The CUDA rows of the dispatch table where there is no GPU: present, refused with a reason, and no matter to the CPU."""

from __future__ import annotations

import pytest

from pyengine import _C

OPS = (_C.QLinear, _C.Embedding, _C.RmsNorm, _C.SiluMul, _C.Transform, _C.RopeKV, _C.Attention, _C.Sample)
CUDA_ROWS = [(op, row) for op in OPS for row in op.kernels() if row["device"] == "cuda"]
pytestmark = pytest.mark.skipif(not CUDA_ROWS, reason="built without CUDA")


@pytest.mark.parametrize("op, row", CUDA_ROWS, ids=lambda v: v["name"] if isinstance(v, dict) else "")
def test_a_machine_without_a_gpu_says_so(op, row):
    if row["missing"] is None:
        pytest.skip("this machine has a GPU")
    problem = op()
    problem.dtype = 1
    with pytest.raises(RuntimeError, match=f"{row['name']}: no CUDA device: "):
        problem.choose()
    with pytest.raises(RuntimeError, match=f"{row['name']}: no CUDA device: "):
        problem.run(kernel=row["name"])


@pytest.mark.parametrize("op", sorted({op for op, _ in CUDA_ROWS}, key=lambda op: op.__name__), ids=lambda op: op.__name__)
def test_the_type_of_the_activations_says_which_device_an_op_is_for(op):
    for row in op.kernels():
        problem = op()
        problem.dtype = 2 if row["device"] == "cpu" else 0
        if row["missing"] is None:
            with pytest.raises(RuntimeError, match=f"{row['name']}: takes f(32|16 or bf16) activations"):
                problem.choose(row["name"])
