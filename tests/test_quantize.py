"""The grid, rounding and outliers against brute force, and the driver end to end on a real 260k-parameter model."""

import builtins
import errno
import importlib
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stories import STORIES, contents, crash_at, needs_stories, quiet

from pyengine import checkpoint as checkpoint_module
from pyengine.errors import CheckpointError
from pyengine.formats import open_checkpoint
from pyengine.inspect import describe
from pyengine.loader import load
from pyengine.models import llama
from pyengine.qtensor import QTensor, fit_group
from pyengine.quant import calibration
from pyengine.quant.calibration import FloatModel, sample_text, self_written, text_windows
from pyengine.quant.common import SCOPES, SCORES, Spec, fit_grid, quantize_matrix, top_mask
from pyengine.tokenizer import load_tokenizer

driver = importlib.import_module("pyengine.quantizer")
DATA = Path(__file__).parents[2] / "shared" / "data"


def quantize(out, method="gwq", **options):
    options = {"samples": 2, "seq_len": 24, "progress": quiet} | options
    return driver.quantize(STORIES, out, method, **options)


# ---- arithmetic


def brute_force(row, bits, symmetric, skip):
    """Dequantized row of one group in numpy, an entry at a time."""
    kept = [np.float32(v) for v, s in zip(row, skip, strict=True) if not s]
    if symmetric:
        scale = max((abs(v) for v in kept), default=np.float32(0)) / np.float32(2 ** (bits - 1) - 1)
        low, high, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0
    else:
        least, most = min([*kept, np.float32(0)]), max([*kept, np.float32(0)])
        scale = (most - least) / np.float32(2**bits - 1)
        low, high = 0, 2**bits - 1
    scale = np.float32(np.float16(max(scale, np.float32(2.0**-24))))
    if not symmetric:
        zero = int(np.clip(np.rint(-least / scale), low, high))
    out = [scale * np.float32(np.clip(np.rint(np.float32(v) / scale) + zero, low, high) - zero) for v in row]
    return [np.float32(np.float16(v)) if s else q for v, q, s in zip(row, out, skip, strict=True)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_matrix_equals_brute_force(bits, symmetric, group_size):
    g = torch.Generator().manual_seed(bits)
    w = torch.randn(7, 192, generator=g)
    mask = torch.rand(7, 192, generator=g) < 0.03
    w[mask] *= 20
    w[2, :64], mask[3, 64:128] = 0, True  # nothing to scale: a zero group and an all-outlier group
    q = quantize_matrix(w, Spec(bits=bits, symmetric=symmetric, group_size=group_size), mask).check(7)
    group = fit_group(group_size, 192)
    assert q.scale.dtype == torch.float16 and q.scale.shape == (7, 192 // group) and bool((q.scale > 0).all())
    for j in range(7):
        for a in range(0, 192, group):
            want = brute_force(w[j, a : a + group].numpy(), bits, symmetric, mask[j, a : a + group].tolist())
            assert q.dequantize()[j, a : a + group].tolist() == [float(v) for v in want]


def test_outliers_do_not_stretch_the_grid():
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 64, dtype=torch.bool)
    mask[:, 5] = True
    spoiled = w.clone()
    spoiled[:, 5] = 1000.0
    for symmetric in (True, False):
        clean = w.masked_fill(mask, 0)
        assert torch.equal(fit_grid(spoiled, 4, 32, symmetric, mask)[0], fit_grid(clean, 4, 32, symmetric)[0])


def test_code_at_an_outlier_must_be_the_zero_code():
    w = torch.randn(4, 64)
    mask = torch.zeros(4, 64, dtype=torch.bool)
    mask[1, 7] = True
    q = quantize_matrix(w, Spec(group_size=32), mask)
    q.check()
    q.weight[1, 3] ^= 0x10
    with pytest.raises(CheckpointError, match="zero code"):
        q.check()


def test_scale_that_overflows_float16_is_float32():
    w = torch.randn(4, 64) * 1e6
    q = quantize_matrix(w, Spec(group_size=32)).check()
    assert q.scale.dtype == torch.float32
    assert float((q.dequantize() - w).norm() / w.norm()) < 0.2


def test_refused_matrices():
    w = torch.zeros(2, 32)
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[0, 0], w[0, 0] = True, 1e5
    with pytest.raises(CheckpointError, match="q_proj.*100000 does not fit float16"):
        quantize_matrix(w, Spec(), mask, name="q_proj")
    w[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="q_proj: 1 of 64 values are NaN"):
        quantize_matrix(w, Spec(), name="q_proj")


def test_top_mask_is_exact_and_breaks_ties_by_place():
    g = torch.Generator().manual_seed(1)
    for levels in (1, 2, 5, 1000):
        score = torch.randint(0, levels, (13, 31), generator=g).float()
        for share in (0.0, 0.01, 0.1, 0.5, 1.0):
            flat = score.flatten().tolist()
            best = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[: int(share * len(flat))]
            assert top_mask(score, share).flatten().nonzero().flatten().tolist() == sorted(best)


def test_q8_0_matrix_survives_as_head():
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (64, 6, 32), generator=g)
    codes[:, :, 3] = 127  # Q8_0 scales its largest weight to 127
    w = (codes * torch.rand(64, 6, 1, generator=g).half().float()).flatten(1)
    assert torch.equal(quantize_matrix(w, Spec(bits=8, group_size=driver.HEAD_GROUP)).dequantize(), w)


def test_shipped_q8_0_embedding_survives_as_head(demo_gguf):
    w = open_checkpoint(demo_gguf).get("model.embed_tokens.weight")[:6000].float()
    assert torch.equal(quantize_matrix(w, Spec(bits=8, group_size=driver.HEAD_GROUP)).dequantize(), w)


# ---- driver


@needs_stories
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"symmetric": False, "group_size": 0}),
        ("gwq", {"group_size": 32, "scope": "tensor"}),
        ("gwq", {"bits": 3, "score": "hdiag_dw2"}),
        ("gwq", {"score": "abs_w", "outliers": 0.05, "head_bits": 16}),
        ("gwq-paper", {"bits": 8}),
    ],
)
def test_checkpoint_holds_the_model(tmp_path, text, method, options):
    out = tmp_path / "out"
    done = quantize(out, method, calib=text, **options)
    source, result = open_checkpoint(STORIES), open_checkpoint(out)
    config = llama.Config.from_dict(result.config)
    stored = load_file(out / "model.safetensors")
    nbytes = numel = outliers = 0
    for i in range(config.num_hidden_layers):
        for name in llama.LINEARS:
            n, k = config.linear_shape(name)
            module = f"model.layers.{i}.{name}"
            q = QTensor.read(module, n, k, result.get)
            w = source.float(f"{module}.weight", (n, k))
            assert float((q.dequantize() - w).norm() / w.norm()) < {8: 0.02, 4: 0.25, 3: 0.35}[options.get("bits", 4)]
            nbytes, numel, outliers = nbytes + q.nbytes, numel + n * k, outliers + q.outliers
            share = 0 if method == "rtn" else options.get("outliers", 0.01)
            assert q.outliers == int(share * n * k)
        for name in llama.NORMS:
            name = f"model.layers.{i}.{name}.weight"
            assert torch.equal(result.get(name), source.get(name))
    assert done["bits_per_weight"] == 8 * nbytes / numel and done["outlier_share"] == outliers / numel
    embedding = source.float("model.embed_tokens.weight", (512, 64))
    if options.get("head_bits") == 16:
        assert torch.equal(result.get("model.embed_tokens.weight"), embedding.half())
    else:
        assert float((QTensor.read("model.embed_tokens", 512, 64, result.get).dequantize() - embedding).abs().max()) < 0.02
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(stored, "model.safetensors")
    crc = {name: f"{zlib.crc32(t.contiguous().view(torch.uint8).numpy().tobytes()):08x}" for name, t in stored.items()}
    assert index["metadata"]["crc32"] == crc
    assert config.tie_word_embeddings and result.config["quantization_config"]["quant_method"] == "pyengine"
    assert load_tokenizer(result).encode("Once upon a time") == load_tokenizer(source).encode("Once upon a time")
    assert not (tmp_path / "out.partial").exists() and not (out / "work").exists()


@needs_stories
def test_tensors_that_a_method_returns_beside_its_linears(tmp_path, monkeypatch):
    """They lie in their block under their name, instead of what the driver would have written."""
    module = driver.load_method("rtn")
    real = module.quantize_block

    def more(block, inputs, spec):
        (block.folder / "note").write_text("kept")
        return real(block, inputs, spec) | {"attn_in.left": torch.eye(4).half(), "input_layernorm.weight": torch.full((64,), 3.0)}

    monkeypatch.setattr(module, "quantize_block", more)
    monkeypatch.setattr(module, "statistics", lambda folder: {"note": (folder / "note").read_text()}, raising=False)
    done = driver.quantize(STORIES, tmp_path / "out", "rtn", progress=quiet)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["model.layers.4.attn_in.left"], torch.eye(4).half())
    assert bool((stored["model.layers.4.input_layernorm.weight"] == 3).all())
    assert not bool((stored["model.layers.4.post_attention_layernorm.weight"] == 3).all())
    assert done["statistics"] == {"note": "kept"}
    found = describe(open_checkpoint(tmp_path / "out"))
    weights = sum(q.numel() for q in (stored[f"model.layers.{i}.{name}.weight"] for i in range(5) for name in llama.LINEARS)) * 2  # two codes a byte
    held = sum(t.nbytes for name, t in stored.items() if name.startswith("model.layers.") and "norm" not in name)
    assert found["linear_weights"] == weights and done["bits_per_weight"] == found["bits_per_weight"] == 8 * held / weights


@needs_stories
def test_untied_head_and_shards(tmp_path, text, monkeypatch):
    source = tmp_path / "untied"
    shutil.copytree(STORIES, source)
    for file in (source, *source.iterdir()):
        file.chmod(0o755)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = (tensors["model.embed_tokens.weight"] * 2).to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    monkeypatch.setattr(checkpoint_module, "SINGLE_FILE_BYTES", 0)
    driver.quantize(source, tmp_path / "out", "rtn", progress=quiet)
    assert sorted(f.name for f in (tmp_path / "out").glob("*.safetensors")) == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    result = open_checkpoint(tmp_path / "out")
    head = QTensor.read("lm_head", 512, 64, result.get)
    assert float((head.dequantize() - tensors["lm_head.weight"].float()).abs().max()) < 0.03
    assert result.get("model.embed_tokens.weight").dtype == torch.float16
    tensors["lm_head.weight"] *= 1e6
    save_file(tensors, source / "model.safetensors")
    driver.quantize(source, tmp_path / "large", "rtn", head_bits=16, progress=quiet)
    assert open_checkpoint(tmp_path / "large").get("lm_head.weight").dtype == torch.float32


@needs_stories
def test_same_request_same_bytes(tmp_path, text):
    quantize(tmp_path / "a", calib=text)
    quantize(tmp_path / "b", calib=text)
    quantize(tmp_path / "c", calib=text, seed=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    assert len({f.stat().st_mode for f in (tmp_path / "a").iterdir()}) == 1


@needs_stories
@pytest.mark.parametrize("nth", [1, 2, 8, 9, 10, 11, 14, 20, 30, 49, 50, 51, 56, 57, 58])
def test_resume_after_a_crash_gives_the_same_bytes(tmp_path, text, monkeypatch, nth):
    """The process dies before the nth file gets its name; 2 blocks and the end are among the places."""
    out = tmp_path / "out"
    with crash_at(monkeypatch, nth):
        quantize(out, calib=text)
    assert not out.exists()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "out.partial")
    left = contents(tmp_path / "out.partial")
    written, real = [], checkpoint_module.os.replace
    monkeypatch.setattr(checkpoint_module.os, "replace", lambda a, b: (written.append(Path(b).name), real(a, b)))
    quantize(out, calib=text, resume=True)
    # Finished inputs, gradients and shards are not made again; a block that was cut short redoes its masks.
    for name in left:
        stem = name.removeprefix("work/")
        assert stem.endswith((".tmp", ".json")) or stem not in written or stem.startswith(("mask", "candidates", "loss")), stem
    quantize(tmp_path / "whole", calib=text)
    assert contents(out) == contents(tmp_path / "whole")


@needs_stories
def test_resume_refuses_another_request(tmp_path, text, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(driver, "outer_tensors", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(tmp_path / "out", calib=text)
    with pytest.raises(ValueError, match="bits was 4, is 3") as e:
        quantize(tmp_path / "out", calib=text, bits=3, resume=True)
    assert "seed" not in str(e.value)
    with pytest.raises(ValueError, match="calibration was .*seed was 0, is 5"):
        quantize(tmp_path / "out", calib=text, seed=5, resume=True)
    with monkeypatch.context() as newer, pytest.raises(ValueError, match=f"version was {driver.VERSION}, is {driver.VERSION + 1}"):
        newer.setattr(driver, "VERSION", driver.VERSION + 1)
        quantize(tmp_path / "out", calib=text, resume=True)
    quantize(tmp_path / "out", calib=text, bits=3)  # without resume, what is left is replaced
    assert open_checkpoint(tmp_path / "out").config["quantization_config"]["bits"] == 3


@needs_stories
@pytest.mark.parametrize("room", [100, 20_000, 150_000, 320_000])
def test_full_disk_leaves_nothing_that_loads(tmp_path, text, monkeypatch, room):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            nonlocal room
            room -= memoryview(data).nbytes
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    monkeypatch.setattr(checkpoint_module, "open", lambda *a: Full(builtins.open(*a)), raising=False)
    with pytest.raises(OSError, match="No space left"):
        quantize(tmp_path / "out", calib=text)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "out.partial")


@needs_stories
def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    quantize(tmp_path / "out", "rtn")  # an empty directory is taken
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="not an empty directory"):
        quantize(tmp_path / "out", "rtn")
    assert contents(tmp_path / "out") == before
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not left by a quantization"):
        quantize(tmp_path / "other", "rtn")
    assert (tmp_path / "other.partial" / "thesis.txt").exists()


@needs_stories
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq2"}, "method is 'gptq2', expected one of .*gptq, gwq, gwq-paper"),
        ({"method": "common"}, "method is 'common'"),
        ({"bits": 5}, "bits is 5, expected one of 2, 3, 4, 8"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 48}, "group_size is 48, expected one of 0, 32, 64, 128"),
        ({"outliers": 1.5}, "outliers is 1.5, expected"),
        ({"outliers": float("nan")}, "outliers is nan"),
        ({"score": "best"}, "score is 'best', expected one of None, abs_g"),
        ({"scope": "rows"}, "scope is 'rows', expected one of None, tensor, global, row, structured, columns"),
        ({"method": "gwq-paper", "score": "sq_g"}, "gwq-paper ranks by abs_g"),
        ({"head_bits": 4}, "head_bits is 4"),
        ({"act_bits": 7}, "act_bits is 7"),
        ({"samples": 0}, "samples is 0"),
        ({"steps": 5}, "steps is 5, but gwq does not train"),
        ({"seed": -1}, "seed is -1"),
        ({"seq_len": 1000}, "seq_len is 1000, but the model was made for at most 512"),
    ],
)
def test_arguments_are_checked(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(tmp_path / "out", **{"calib": text} | options)
    assert not list(tmp_path.glob("out*"))


@needs_stories
def test_nan_weight_is_named(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(STORIES, source)
    for file in (source, *source.iterdir()):
        file.chmod(0o755)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.layers.3.mlp.up_proj.weight: 1 of \d+ values"):
        driver.quantize(source, tmp_path / "out", "rtn", progress=quiet)
    assert not (tmp_path / "out").exists()


# ---- calibration text


@needs_stories
def test_text_that_cannot_be_used(tmp_path, text):
    tokenizer = load_tokenizer(open_checkpoint(STORIES))
    have = len(tokenizer.encode(text.read_text(), special=False))
    with pytest.raises(ValueError, match=f"has {have} tokens, 100 windows of 200 need 20000"):
        text_windows(text, tokenizer, 100, 200, 0)
    text.write_bytes(b"once upon \xff a time")
    with pytest.raises(ValueError, match="not UTF-8 text: byte 0xff at offset 10"):
        text_windows(text, tokenizer, 1, 4, 0)


@needs_stories
def test_windows_are_spread_and_do_not_overlap(text):
    tokenizer = load_tokenizer(open_checkpoint(STORIES))
    tokenizer.encode = lambda t, special: [1] if special else list(range(1000))
    windows = text_windows(text, tokenizer, 5, 100, 3)
    assert windows[:, 0].tolist() == [1] * 5  # this model starts every text with <s>
    for i, window in enumerate(windows):
        assert window[1:].diff().eq(1).all() and 200 * i < window[1] and window[-1] < 200 * (i + 1)
    assert not torch.equal(windows, text_windows(text, tokenizer, 5, 100, 4))


@needs_stories
def test_self_written_text_is_seeded_cached_and_plausible(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = open_checkpoint(STORIES)
    model, tokenizer = FloatModel.of(source), load_tokenizer(source)
    ids = self_written(model, tokenizer, 4, 60, 0, quiet)
    assert ids.shape == (4, 60) and (ids[:, 0] == 1).all() and len(set(ids[:, 1].tolist())) > 1
    assert torch.equal(ids, sample_text(source, tokenizer, 4, 60, 0, quiet))
    assert not torch.equal(ids, sample_text(source, tokenizer, 4, 60, 1, quiet))
    monkeypatch.setattr(calibration, "sample_text", None)
    assert torch.equal(ids, self_written(model, tokenizer, 4, 60, 0, quiet))
    words = tokenizer.decode(ids.flatten().tolist())
    assert " the " in words and " was " in words


@needs_stories
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_runs_resumes_and_loads(tmp_path, text, monkeypatch, scope):
    done = quantize(tmp_path / "whole", calib=text, scope=scope, outliers=0.02)
    assert 0.015 < done["outlier_share"] < 0.025 and done["spec"]["scope"] == scope
    real = checkpoint_module.os.replace

    def replace(a, b):
        if Path(b).name.startswith(("mask-00002-self_attn.v", "candidates-00002-self_attn.v", "model-00003")):
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            quantize(tmp_path / "out", calib=text, scope=scope, outliers=0.02)
    quantize(tmp_path / "out", calib=text, scope=scope, outliers=0.02, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert describe(open_checkpoint(tmp_path / "out"))["outlier_share"] == done["outlier_share"]
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    source, engine = load(STORIES), load(tmp_path / "out")
    expected = source.logits(ids[0].tolist())
    assert float((engine.logits(ids[0].tolist()) - expected).norm() / expected.norm()) < 0.2


@needs_stories
def test_every_score_is_a_method_option(tmp_path, text):
    for score in SCORES:
        done = quantize(tmp_path / score, calib=text, score=score)
        assert 0.0095 < done["outlier_share"] <= 0.01
