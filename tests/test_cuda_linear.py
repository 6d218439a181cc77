"""`Linear` on GPUs: the whole way from a module to a kernel, on the emulated ones and with `-m gpu` on real ones."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from weights import random_weight

from pyengine import linear as linear_module
from pyengine import ops, torch_ops
from pyengine.linear import Linear
from pyengine.qtensor import QTensor, unpack_codes

BOUND = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # ops.h
# Forms and shapes: inputs that fill no 16 bytes, several tiles, several blocks that share outputs through the workspace.
WEIGHTS = ((4, 33, 96, 32, "sparse"), (8, 17, 37, 37, "full_row"), (4, 130, 1536, 128, "sparse"))
TOKENS = (1, 5, 17)


def weight(bits: int, n: int, k: int, group: int, mask: str) -> QTensor:
    return random_weight(n, k, group, bits, asymmetric=bits == 4, mask=mask, bias=bits == 4)


def same(a: QTensor, b: QTensor) -> bool:
    return a.tensors().keys() == b.tensors().keys() and all(torch.equal(t, b.tensors()[key]) for key, t in a.tensors().items())


def check_result(y: torch.Tensor, x: torch.Tensor, w: QTensor) -> None:
    expected = x.double() @ w.dequantize().double().T + (0 if w.bias is None else w.bias.double())
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert (y.double() - expected).norm() <= BOUND[x.dtype] * expected.norm()


class OnEmulated(torch.Tensor):
    """A tensor in the memory of the emulated GPU, which is this process's own, that says it is on CUDA device `emulated.index`."""

    emulated: SimpleNamespace  # the fixture below

    @classmethod
    def over(cls, array, dtype: torch.dtype, shape) -> torch.Tensor:
        data = np.ctypeslib.as_array((ctypes.c_uint8 * array.nbytes).from_address(array.ptr))
        return torch.from_numpy(data).view(dtype).view(shape).as_subclass(cls)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.emulated.index)

    def new_empty(self, *shape: int) -> torch.Tensor:
        size = int(np.prod(shape)) * self.element_size()
        return self.over(self.emulated.device.empty(size, np.uint8), self.dtype, shape)

    def copy_(self, source: torch.Tensor) -> torch.Tensor:
        super().copy_(source)
        storage = self.untyped_storage()
        content = np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())).copy()
        self.emulated.device.library.emu_upload(storage.data_ptr(), content.ctypes.data, content.nbytes)
        return self

    def to(self, *args, **kwargs) -> torch.Tensor:
        if torch.device("cpu") not in [torch.device(a) for a in args if isinstance(a, (str, torch.device))]:
            return super().to(*args, **kwargs)
        storage = self.untyped_storage()
        array = SimpleNamespace(ptr=storage.data_ptr(), nbytes=storage.nbytes(), shape=storage.nbytes(), dtype=np.uint8)
        content = torch.from_numpy(self.emulated.device.download(array)).view(self.dtype)
        return content.as_strided(self.shape, self.stride(), self.storage_offset())


@pytest.fixture
def emulated(device, monkeypatch):
    """An emulated GPU that is not the current one, with torch on it as far as Linear asks for torch."""
    if not device.emulated:
        pytest.skip("real GPUs have tests of their own below")
    found = SimpleNamespace(device=device, index=int(device.arch == 90))
    move = torch.Tensor.to

    def to(t: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        cuda = [a for a in args if isinstance(a, torch.device) and a.type == "cuda"]
        if cuda and not t.numel():  # asked where something would go
            return SimpleNamespace(device=cuda[0])
        if cuda:
            content = t.contiguous().view(torch.uint8).numpy()
            return OnEmulated.over(device.array(content, "moved"), t.dtype, t.shape)
        return move(t, *args, **kwargs)

    monkeypatch.setattr(OnEmulated, "emulated", found, raising=False)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda gpu: SimpleNamespace(cuda_stream=device.stream))
    monkeypatch.setattr(torch_ops, "traced", lambda x: False)
    for module in (linear_module, ops, torch_ops):
        monkeypatch.setattr(module, "_C", device.ops)
    make_current(found, 1 - found.index)
    return found


def make_current(emulated: SimpleNamespace, index: int) -> None:
    emulated.device.library.emu_configure(1, 3, 2, 1, 90 if index else 80)


def current(emulated: SimpleNamespace) -> int:
    rows = emulated.device.ops.QLinear.kernels()
    return int(next(row for row in rows if row["name"] == "qlinear_gemm_sm90")["missing"] is None)


def placed(x: torch.Tensor, emulated: SimpleNamespace) -> torch.Tensor:
    return x.to(torch.device("cuda", emulated.index))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_a_layer_on_a_gpu_that_is_not_the_current_one(emulated, dtype):
    for form in WEIGHTS:
        w = weight(*form)
        layer = Linear(w).to(f"cuda:{emulated.index}")
        for m in TOKENS:
            x = torch.randn(m, w.k).to(dtype)
            check_result(layer(placed(x, emulated)).to("cpu"), x, w)
            assert layer.kernel_name(m).startswith("qlinear_gemm_sm90" if m > 16 and emulated.index else "qlinear_")
        assert current(emulated) == 1 - emulated.index
        assert same(layer.quantized(), w)
        emulated.device.check()


def test_rows_that_begin_anywhere_with_a_residual_and_a_place_for_the_result(emulated):
    w = weight(*WEIGHTS[0])
    layer = Linear(w).to(f"cuda:{emulated.index}")
    wide, residual = torch.randn(5, 100).half(), torch.randn(5, 33).half()
    out = placed(residual, emulated).new_empty(5, 33)
    layer(placed(wide, emulated)[:, 3:99], residual=placed(residual, emulated), out=out)
    check_result(out.to("cpu") - residual, wide[:, 3:99], w)


def test_what_a_gpu_does_not_take_is_refused(emulated):
    w = weight(*WEIGHTS[0])
    cuda = f"cuda:{emulated.index}"
    layer = Linear(w).to(cuda)
    for x, what in ((torch.randn(2, 96).half(), "float16 on cpu"), (placed(torch.randn(2, 96), emulated), f"float32 on {cuda}")):
        with pytest.raises(ValueError, match=f"x is {what}, expected float16 or bfloat16 on {cuda}"):
            layer(x)
    with pytest.raises(ValueError, match=f"x is float16 on {cuda}, expected floats on the CPU"):
        Linear(w)(placed(torch.randn(2, 96).half(), emulated))
    with pytest.raises(ValueError, match="capture a CUDA graph instead"):
        layer(placed(torch.randn(2, 96).half(), emulated), program=ops.Program())
    for (n, k, group), change, why in (
        ((16, 64, 32), {"act_bits": 8}, "takes groups of 64, 128 or a whole row"),
        ((16, 24, 24), {"act_bits": 8}, "k is no multiple of 16"),
        ((16, 48, 48), {"act_bits": 4}, "k is no multiple of 32"),
        ((16, 64, 32), {"gated": True}, "gates no result"),
    ):
        with pytest.raises(RuntimeError, match=why):
            Linear(random_weight(n, k, group), **change).to(cuda)


def integers(x: torch.Tensor, w: QTensor, act_bits: int, clip: torch.Tensor | None) -> torch.Tensor:
    """x [m, k] · wᵀ with x quantized as ops.h says, in x's dtype."""
    high, low = (1, 1) if clip is None else clip
    most = (1 << (act_bits - 1)) - 1
    scale = torch.maximum(x.float().clamp(min=0).amax(1) * high, (-x.float()).clamp(min=0).amax(1) * low) / most
    codes = (x.float() * torch.where(scale > 0, 1 / scale, 0)[:, None]).round().clamp(-most - 1, most)
    weights = unpack_codes(w.weight, w.k, w.container).long() - (1 << (w.container - 1))
    y = (codes.long() @ weights.T).float() * (w.scale.float().T * scale[:, None])
    return (y if w.bias is None else y + w.bias.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_activations_are_quantized_to_integers_on_the_way(emulated, dtype):
    """The very bits that exact sums give, and for a token the same in any batch; 4112 inputs are no product of two factors up to 256."""
    cases = ((4, 70, 576, 8, None), (4, 17, 4112, 8, [0.9, 0.7]), (8, 33, 96, 8, None), (4, 130, 1568, 4, [0.6, 1.0]))
    for bits, n, k, act_bits, clip in cases:
        w, clip = random_weight(n, k, k, bits, bias=bits == 4), clip and torch.tensor(clip)
        layer = Linear(w, act_bits, act_clip=clip).to(f"cuda:{emulated.index}")
        wide = torch.randn(37, k + 16).to(dtype)
        wide[0] = 0
        x, on_gpu = wide[:, 8 : k + 8], placed(wide, emulated)[:, 8 : k + 8]  # rows as kernels take them
        expected = integers(x, w, act_bits, clip)
        for begin, end in ((0, 37), (3, 4), (30, 37)):
            assert torch.equal(layer(on_gpu[begin:end]).to("cpu"), expected[begin:end]), (n, k, begin, end)
            assert layer.kernel_name(end - begin) == f"qlinear_int_sm{emulated.device.arch}"
        assert torch.equal(torch_ops._run(on_gpu, *torch_ops.arguments(layer)).to("cpu"), expected)
        assert same(layer.quantized(), w)
        emulated.device.check()


@pytest.mark.parametrize("act_bits", (16, 8))
def test_whole_columns_come_along(emulated, act_bits):
    w = random_weight(70, 576, 576, 8, columns=5)
    x = torch.randn(20, 576).half()
    layer = Linear(w, act_bits).to(f"cuda:{emulated.index}")
    expected = x.double() @ w.dequantize().double().T
    error = (layer(placed(x, emulated)).to("cpu").double() - expected).norm()
    assert error <= (1e-3 if act_bits == 16 else 2e-2) * expected.norm() and same(layer.quantized(), w)


def test_what_is_not_finite_stays_visible(emulated):
    w = random_weight(16, 64, 64, 4)
    x = torch.randn(3, 64).half()
    x[1, 5], x[2, 6] = torch.inf, torch.nan
    y = Linear(w, 8).to(f"cuda:{emulated.index}")(placed(x, emulated)).to("cpu")
    assert torch.equal(y[0], integers(x[:1], w, 8, None)[0]) and y[1:].isnan().all()


def test_codes_have_room_of_their_own(emulated):
    """In the workspace, behind the counters and sums of blocks that share outputs: another one in each stream and in each capture."""
    w, x = random_weight(130, 1568, 1568, 4), torch.randn(33, 1568).half()
    layer, on_gpu, expected = Linear(w, 8).to(f"cuda:{emulated.index}"), placed(x, emulated), integers(x, w, 8, None)
    small = Linear(random_weight(16, 64, 64, 4), 8).to(f"cuda:{emulated.index}")  # whose blocks share nothing
    streams, results = [emulated.device.stream, emulated.device.new_stream()], []
    for i, stream in enumerate(streams * 2):
        emulated.device.stream = stream
        emulated.device.library.emu_capture(stream, 7 if i == 2 else 0)
        small(placed(torch.randn(3, 64).half(), emulated))
        results.append((stream, layer(on_gpu)))
        emulated.device.library.emu_capture(stream, 0)
    for stream, y in results:
        emulated.device.stream = stream
        assert torch.equal(y.to("cpu"), expected)
    emulated.device.check()


def test_two_streams_do_not_share_a_workspace(emulated):
    """Blocks that share outputs count each other in it: the emulator reports accesses of two streams that nothing orders."""
    w = weight(*WEIGHTS[2])
    layer, x = Linear(w).to(f"cuda:{emulated.index}"), torch.randn(3, w.k).half()
    on_gpu, streams, results = placed(x, emulated), [emulated.device.stream, emulated.device.new_stream()], []
    for stream in streams * 2:
        emulated.device.stream = stream
        results.append((stream, layer(on_gpu)))
    for stream, y in results:
        emulated.device.stream = stream
        check_result(y.to("cpu"), x, w)
    emulated.device.check()


def test_a_stream_a_capture_and_a_gpu_have_a_workspace_of_their_own(emulated):
    library, index = emulated.device.library, emulated.index
    stream = [emulated.device.new_stream() for _ in range(20)][-1]  # whose number no test before this has had
    workspace = emulated.device.ops.gpu_workspace

    def is_zero(address: int, size: int) -> bool:
        content = np.ones(size, np.uint8)
        return bool(library.emu_download(content.ctypes.data, address, size)) and not content.any()

    first = workspace(stream, 1000, index)
    assert first % 64 == 0 and is_zero(first, 1000) and workspace(stream, 500, index) == first and workspace(stream, 0, index) == 0
    library.emu_capture(stream, 7)
    in_graph = workspace(stream, 1000, index)
    assert in_graph != first and is_zero(in_graph, 1000) and workspace(stream, 10, index) == in_graph
    library.emu_capture(stream, 8)
    assert workspace(stream, 1000, index) not in (first, in_graph)
    library.emu_capture(stream, 0)
    assert workspace(stream, 1000, index) == first
    grown = workspace(stream, 3 << 20, index)
    assert grown != first and is_zero(grown, 3 << 20) and workspace(stream, 1000, index) == grown
    assert len({grown, workspace(stream, 1000, 1 - index), workspace(emulated.device.new_stream(), 1000, index)}) == 3
    assert current(emulated) == 1 - index


def test_each_gpu_is_asked_what_it_lacks(emulated):
    for index, lacks in ((0, "this GPU is not of compute capability 9.0 (Hopper)"), (1, None)):
        missing = {row["name"]: row["missing"] for row in ops.kernels(index)["QLinear"]}
        assert missing["qlinear_gemm_sm90"] == lacks and missing["qlinear_decode_sm80"] is None


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@on_gpu
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_moving_a_layer_to_a_gpu_and_back(dtype):
    for form in WEIGHTS:
        w = weight(*form)
        layer, x = Linear(w), torch.randn(2, 9, w.k).to(dtype)
        on_cpu = layer(x)
        assert layer.cuda() is layer and layer.device == torch.device("cuda", torch.cuda.current_device())
        check_result(layer(x.cuda()).cpu(), x, w)
        check_result(layer.half()(x.cuda()[..., 1:, :]).cpu(), x[..., 1:, :], w)
        assert same(layer.quantized(), w)
        assert torch.equal(layer.cpu()(x), on_cpu)
        again = Linear(random_weight(w.n, w.k, w.k), device="cuda")
        again.load_state_dict(layer.state_dict())
        check_result(again(x.cuda()).cpu(), x, w)


@on_gpu
def test_replacing_a_linear_on_a_gpu():
    linear, x = nn.Linear(256, 96).half().cuda(), torch.randn(3, 256).half().cuda()
    layer = Linear.from_float(linear, bits=8)
    assert layer.device == linear.weight.device and (layer(x) - linear(x)).norm() < 0.01 * linear(x).norm()


@on_gpu
def test_streams_side_by_side():
    w = weight(*WEIGHTS[2])
    layer, xs = Linear(w, device="cuda"), [torch.randn(m, w.k).half().cuda() for m in (1, 3, 16, 40)]
    expected, streams = [layer(x) for x in xs], [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for x, stream in zip(xs, streams):
            with torch.cuda.stream(stream):
                results.append(layer(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i % len(xs)]) for i, y in enumerate(results))


@on_gpu
@pytest.mark.parametrize("group, act_bits", ((128, 16), (1536, 8), (1536, 4)))
def test_a_captured_graph_repeats_the_forward(group, act_bits):
    """Capture finds a workspace that nobody else uses, ready in a stream that has run nothing; what runs outside of the graph does not disturb it."""
    layers = (random_weight(1536, 1536, group, 4, mask="sparse" if act_bits == 16 else "none") for _ in range(2))
    model = nn.Sequential(*(Linear(w, act_bits) for w in layers)).cuda()
    for m in (1, 40):
        x, graph = torch.randn(m, 1536).half().cuda(), torch.cuda.CUDAGraph()
        model(x)  # loads the kernels
        with torch.cuda.graph(graph):
            y = model(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            outside = model(x)
            torch.cuda.synchronize()
            assert torch.equal(y, outside)


@on_gpu
@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_compiled_on_a_gpu(mode):
    model = nn.Sequential(Linear(weight(4, 1536, 1536, 128, "sparse")), Linear(random_weight(1536, 1536, 1536), 8)).cuda()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.inference_mode():
        for m in (1, 1, 1, 40, 40, 40):
            x = torch.randn(m, 1536).half().cuda()
            assert torch.equal(compiled(x).clone(), model(x))


@on_gpu
def test_several_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    w = weight(*WEIGHTS[2])
    x = torch.randn(3, w.k).half()
    for index in (1, 0, 1):
        layer = Linear(w, device=f"cuda:{index}")
        check_result(layer(x.to(layer.device)).cpu(), x, w)
        assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="x is float16 on cuda:0, expected float16 or bfloat16 on cuda:1"):
        layer(x.to("cuda:0"))
