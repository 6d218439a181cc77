"""`replace_linears` in a model of transformers: what it then computes, generates, saves and compiles to."""

from __future__ import annotations

import copy

import pytest
import torch

from pyengine.linear import Linear, replace_linears


@pytest.fixture(scope="module")
def models():
    """A small Llama of random weights with quantized linears, and one whose float linears have the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        initializer_range=0.2, attention_bias=True,
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(config).eval()
    quantized = copy.deepcopy(dense)
    assert len(replace_linears(quantized, bits=4, group_size=32, outliers=0.02, symmetric=False)) == 2 * 7
    with torch.no_grad():
        for name, layer in quantized.named_modules():
            if isinstance(layer, Linear):
                dense.get_submodule(name).weight.copy_(layer.quantized().dequantize())
    return quantized, dense


IDS = torch.tensor([[5, 9, 81, 2, 40], [1, 33, 7, 7, 12]])


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 2e-3 * b.norm())  # per linear the bound is 1e-4 (ops.h)


@torch.no_grad()
def test_logits_and_texts_are_those_of_the_dequantized_weights(models):
    quantized, dense = models
    assert close(quantized(IDS).logits, dense(IDS).logits)
    texts = [model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0) for model in models]
    assert texts[0].shape == (2, 17) and torch.equal(*texts)


@torch.no_grad()
def test_a_saved_model_comes_back(models, tmp_path):
    from safetensors.torch import load_model, save_model

    quantized = models[0]
    save_model(quantized, str(tmp_path / "model.safetensors"))
    other = copy.deepcopy(quantized)
    for p in other.parameters():
        p.zero_()
    for layer in (m for m in other.modules() if isinstance(m, Linear)):
        layer.load_state_dict(Linear.from_float(torch.nn.Linear(layer.in_features, layer.out_features), bits=8, group_size=32).state_dict())
    assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(other(IDS).logits, quantized(IDS).logits)


@torch.no_grad()
def test_the_model_compiles_as_a_whole(models):
    quantized = models[0]
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS[:, :3], IDS[:1]):
        assert close(compiled(ids, use_cache=False).logits, quantized(ids, use_cache=False).logits)


def test_the_model_compiles_where_torch_would_differentiate(models):
    quantized = models[0]
    logits = torch.compile(quantized, backend="aot_eager")(IDS, use_cache=False).logits
    assert close(logits.detach(), quantized(IDS, use_cache=False).logits.detach())
    with pytest.raises(RuntimeError, match="pyengine.Linear has no backward pass"):
        logits.sum().backward()
