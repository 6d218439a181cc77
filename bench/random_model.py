"""A model of 1.2 B random weights in the shapes of Llama 3.2 1B, to measure bandwidth with: `python bench/random_model.py OUT_DIR OUT.gguf`.

It is written in quantized form at once, as a PyEngine checkpoint (4 bits, groups of 128, 1 % outliers, an 8-bit output matrix) and as the GGUF
that llama.cpp's quantizer would make of it (Q4_0, the output matrix Q6_K). What it says is noise; what it moves and computes is a real model's.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm import tqdm

from pyengine import demo
from pyengine.checkpoint import Writer, require_free
from pyengine.formats import open_checkpoint
from pyengine.models import llama
from pyengine.qtensor import QTensor, outliers_from_mask, pack_codes
from pyengine.quant.common import Spec
from pyengine.quantizer import named, output_config
from pyengine.tokenizer import load_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUP, SHARE = 128, 0.01
# Masks chosen by gradients are uneven. On SmolLM2-135M the fullest 1 % of the columns hold 34-61 % of the outliers, of the rows 5-27 %, and the
# fullest row has 28 times the mean: log-normal densities of columns and rows with these deviations do the same (45 %, 15 % and about 30).
COLUMN_SIGMA, ROW_SIGMA, FULLEST = 2.2, 1.3, 0.97
STD = 0.02  # of the weights


def skewed_mask(n: int, k: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """bool[n, k], about `share` of it true, crowded into some rows and columns."""
    row = (ROW_SIGMA * torch.randn(n, 1, generator=generator)).exp()
    column = (COLUMN_SIGMA * torch.randn(1, k, generator=generator)).exp()
    some = row.sort(dim=0).values[:: max(1, n // 256)]  # stands for all rows while the density is fitted
    factor = share / (some.mean() * column.mean())
    for _ in range(12):  # a density cannot pass FULLEST; what is cut off there goes to the others
        factor *= share / (factor * some * column).clamp(max=FULLEST).mean()
    return torch.rand(n, k, generator=generator) < (factor * row * column).clamp(max=FULLEST)


def quantized(n: int, k: int, bits: int, generator: torch.Generator) -> QTensor:
    codes = torch.randint(1 << bits, (n, k), dtype=torch.uint8, generator=generator)
    deviation = ((1 << 2 * bits) / 12) ** 0.5  # of uniform codes
    scale = torch.full((n, k // GROUP), STD / deviation, dtype=torch.float16)
    if bits == 8:
        return QTensor(k, codes, scale)
    mask = skewed_mask(n, k, SHARE, generator)
    codes[mask] = 1 << (bits - 1)
    row, col, value = outliers_from_mask(mask * (4 * STD), mask)
    return QTensor(k, pack_codes(codes, bits), scale, None, row, col, value)


def write_checkpoint(out: Path, act_bits: int) -> None:
    config, generator = llama.Config.from_dict(CONFIG), torch.Generator().manual_seed(0)
    writer = Writer(out, config.num_hidden_layers + 1, {"random": CONFIG, "act_bits": act_bits})
    for i in tqdm(range(config.num_hidden_layers), desc=out.name, unit="block"):
        tensors = {f"model.layers.{i}.{name}.weight": torch.ones(config.hidden_size) for name in llama.NORMS}
        for name in llama.LINEARS:
            tensors |= named(f"model.layers.{i}.{name}", quantized(*config.linear_shape(name), 4, generator).check())
        writer.write(i, tensors)
    head = quantized(config.vocab_size, config.hidden_size, 8, generator)
    writer.write(config.num_hidden_layers, {"model.norm.weight": torch.ones(config.hidden_size)} | named("model.embed_tokens", head))
    spec = Spec(method="rtn", bits=4, group_size=GROUP, outliers=SHARE, act_bits=act_bits)
    writer.finish(output_config(CONFIG, spec, None), load_tokenizer(open_checkpoint(demo.source())).save)


def random_blocks(n: int, k: int, kind: gguf.GGMLQuantizationType, random: np.random.Generator) -> np.ndarray:
    """u8[n, bytes of a row]: random codes under a scale that gives the weights about the deviation STD."""
    inputs, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (n, k // inputs, size), dtype=np.uint8)
    if kind == gguf.GGMLQuantizationType.Q4_0:  # f16 scale, then 16 bytes of codes
        blocks[:, :, :2] = np.array([STD / 4.6], dtype=np.float16).view(np.uint8)
    else:  # Q6_K: 192 bytes of codes, 16 of i8 scales, then the f16 scale of all
        blocks[:, :, 192:208] = 16
        blocks[:, :, 208:] = np.array([STD / (16 * 18.5)], dtype=np.float16).view(np.uint8)
    return blocks.reshape(n, -1)


def gguf_tensors(config: llama.Config) -> dict[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType]]:
    """Name → (shape, type) of every tensor."""
    kinds = gguf.GGMLQuantizationType
    names = dict(zip(llama.LINEARS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")))
    tensors = {"token_embd.weight": ((config.vocab_size, config.hidden_size), kinds.Q6_K), "output_norm.weight": ((config.hidden_size,), kinds.F32)}
    for i in range(config.num_hidden_layers):
        tensors |= {f"blk.{i}.{norm}.weight": ((config.hidden_size,), kinds.F32) for norm in ("attn_norm", "ffn_norm")}
        tensors |= {f"blk.{i}.{names[name]}.weight": (config.linear_shape(name), kinds.Q4_0) for name in llama.LINEARS}
    return tensors


def write_gguf(out: Path) -> None:
    config, random = llama.Config.from_dict(CONFIG), np.random.default_rng(0)
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")
    tensors = gguf_tensors(config)
    for name, (shape, kind) in tensors.items():
        data = np.float32 if len(shape) == 1 else np.uint8
        inputs, size = gguf.GGML_QUANT_SIZES[kind]
        bytes_shape = shape if len(shape) == 1 else (shape[0], shape[1] // inputs * size)
        writer.add_tensor_info(name, bytes_shape, np.dtype(data), int(np.prod(bytes_shape)) * np.dtype(data).itemsize, raw_dtype=None if len(shape) == 1 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape, kind in tqdm(tensors.values(), desc=out.name, unit="tensor"):
        writer.write_tensor_data(np.ones(shape, np.float32) if len(shape) == 1 else random_blocks(*shape, kind, random))
    writer.close()
    os.replace(partial, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="directory to make, of a PyEngine checkpoint")
    parser.add_argument("gguf", type=Path, help="GGUF file to make")
    parser.add_argument("--act-bits", type=int, default=16, choices=(8, 16))
    args = parser.parse_args()
    try:
        if not (args.checkpoint / "config.json").exists():
            require_free(args.checkpoint)
            write_checkpoint(args.checkpoint, args.act_bits)
        if not args.gguf.exists():
            write_gguf(args.gguf)
    except (ValueError, OSError) as e:
        print(f"random_model.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
