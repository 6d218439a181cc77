"""Qwen2: equal to transformers on the same weights, from a directory and from GGUF, in float and quantized; the real model where it is given."""

from __future__ import annotations

import json
import re
import shutil

import gguf
import numpy as np
import pytest
import torch

from pyengine.cache import Batch
from pyengine.errors import CheckpointError
from pyengine.evaluate import score
from pyengine.formats import open_checkpoint
from pyengine.loader import build, load
from pyengine.models.llama import LINEARS, SITES
from pyengine.quant.calibration import FloatModel
from pyengine.quant.simulate import Simulation
from pyengine.quantizer import load_method, methods, quantize
from pyengine.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")
BIASED = SITES["attn_in"]


def random_model(tied: bool) -> transformers.Qwen2ForCausalLM:
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
        max_position_embeddings=256, tie_word_embeddings=tied, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def logits(model, ids: list[int]) -> torch.Tensor:
    cache = model.cache(1, len(ids))
    return model(Batch.of(ids, [0] * len(ids), list(range(len(ids))), cache), cache)


def agrees(ours, theirs, ids: list[int]) -> None:
    got = logits(ours, ids)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].float()
    assert (got - expected).abs().max() <= 2e-3 * expected.abs().max()


def write_gguf(path, model) -> None:
    """The model as llama.cpp's converter lays out a Qwen2: rows of q and k as they are, three biases a block."""
    c, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    sizes = (c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.max_position_embeddings)
    keys = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv", "context_length")
    for key, value in zip(keys, sizes, strict=True):
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    inner |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
        stored = f"blk.{layer[1]}.{inner[layer[2]]}" if layer else outer[stem]
        if not (stem == "lm_head" and c.tie_word_embeddings):
            writer.add_tensor(f"{stored}.{kind}", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_equals_transformers(tied, tmp_path):
    theirs, ids = random_model(tied), torch.randint(0, 512, (150,)).tolist()
    theirs.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf", theirs)
    for path in (tmp_path / "hf", tmp_path / "m.gguf"):
        ours = build(open_checkpoint(path))
        assert (ours.config.rope_theta, ours.config.max_position_embeddings, ours.config.tie_word_embeddings) == (1e6, 256, tied)
        agrees(ours, theirs, ids)


def test_calibration_sees_what_transformers_computes(tmp_path):
    theirs = random_model(tied=True)
    theirs.save_pretrained(tmp_path)
    source, x = FloatModel.of(open_checkpoint(tmp_path)), torch.randn(2, 20, 64)
    cos, sin = source.arch.rope_table(source.config, 20)
    got = source.arch.block_forward(source.block(1), x, source.config, cos, sin)
    rope = theirs.model.rotary_emb(x, torch.arange(20)[None])
    mask = torch.full((20, 20), float("-inf")).triu(1)[None, None].expand(2, 1, 20, 20)
    with torch.inference_mode():
        expected = theirs.model.layers[1](x, attention_mask=mask, position_embeddings=rope)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_quantized_to_8_bits_keeps_its_biases(tmp_path, stories):
    theirs = random_model(tied=False)
    theirs.save_pretrained(tmp_path / "hf")
    shutil.copy(stories / "tokenizer.model", tmp_path / "hf")
    quantize(tmp_path / "hf", tmp_path / "q", method="rtn", bits=8, group_size=32, progress=lambda items, label: items)
    checkpoint = open_checkpoint(tmp_path / "q")
    assert {n for n in LINEARS if f"model.layers.1.{n}.bias" in checkpoint.shapes} == set(BIASED)
    got, expected = (logits(build(open_checkpoint(tmp_path / x)), list(range(1, 100))) for x in ("q", "hf"))
    assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("method", methods())
def test_every_method_takes_it_and_the_kernels_compute_what_is_stored(method, tmp_path, stories, text):
    """Simulated in torch from the tensors of the checkpoint, biases, transforms, outliers and all."""
    random_model(tied=False).save_pretrained(tmp_path / "hf")
    shutil.copy(stories / "tokenizer.model", tmp_path / "hf")
    options = {"steps": 1} if hasattr(load_method(method), "STEPS") else {}
    options |= {"auto": {"target_bits": 6.0}, "smoothquant": {"act_bits": 8}}.get(method, {})
    options |= {"samples": 2, "seq_len": 24} if method not in ("rtn", "rex", "quarot") else {}
    quantize(tmp_path / "hf", tmp_path / "q", method, calib=text, group_size=32, progress=lambda items, label: items, **options)
    ids = torch.randint(0, 512, (1, 100), generator=torch.Generator().manual_seed(1))
    found = score(load(tmp_path / "q"), ids.tolist()).loss
    assert (found - Simulation(open_checkpoint(tmp_path / "q")).losses(ids)[0]).abs().max() < 0.1


def test_refusals(tmp_path):
    random_model(tied=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_sliding_window": True}))
    with pytest.raises(CheckpointError, match="use_sliding_window is true"):
        build(open_checkpoint(tmp_path))
    write_gguf(tmp_path / "m.gguf", random_model(tied=True))
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"blk.1.attn_k.bias", b"blk.1.attn_o.bias"))
    with pytest.raises(CheckpointError, match="'blk.1.attn_o.bias' has no place"):
        open_checkpoint(tmp_path / "m.gguf")


def test_the_real_model_equals_transformers(qwen2_gguf):
    checkpoint, engine = open_checkpoint(qwen2_gguf), load(qwen2_gguf)
    config = {k: v for k, v in checkpoint.config.items() if k not in ("architectures", "head_dim", "attention_bias", "mlp_bias")}
    with torch.device("meta"):
        theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).eval()
    state = {name: checkpoint.get(name) for name in checkpoint.names()}
    theirs.load_state_dict(state, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # not among the weights, so still on "meta"
    for prompt in ("def fibonacci(n):", "The capital of France is", "1 + 2 + 3 ="):
        completion = engine.generate(prompt, 16)[0]
        ids = engine.tokenizer.encode(prompt) + completion.tokens
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids])).logits[0]
        assert (engine.logits(ids) - expected).abs().max() <= 2e-3 * expected.abs().max()
        assert expected[-len(completion.tokens) - 1 : -1].argmax(1).tolist() == completion.tokens


def test_the_real_vocabulary_equals_transformers(qwen2_gguf):
    ours = load_tokenizer(open_checkpoint(qwen2_gguf))
    theirs = transformers.AutoTokenizer.from_pretrained(qwen2_gguf.parent, gguf_file=qwen2_gguf.name)
    # All of it NFC: their reader of GGUF loses that step.
    for text in ("def f(x):\n    return x ** 2  # naïve 😀", "It's 12345,67 — 東京 <|im_end|>", "a  b\t\tc\r\n\r\n  d"):
        assert ours.encode(text) == theirs(text).input_ids, text
    assert ours.eos_ids >= {151645} and not ours.add_bos and np.array(ours.encode("x")).max() < 151936
