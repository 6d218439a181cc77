"""transformers, float32 and bfloat16 in eager mode, and with torchao's INT8 and INT4 weights. The model is a Hugging Face directory.

The model is called directly, step by step: `generate()` would add milliseconds of Python to each token.
"""

from __future__ import annotations

import torch
import torchao
import transformers
from peer import Run, main, tokens
from transformers import AutoModelForCausalLM, DynamicCache

# torchao leaves a layer as it is where the group does not divide its inputs, without a word; 64 divides those of the demo model.
GROUP = 64


def quantize(model, variant: str) -> str:
    """Quantize the linears of the model in place; returns the configuration."""
    from torchao.prototype.quantization import (
        int4,  # the configurations outside the prototypes have no INT4 kernel for x86
    )
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    config = {
        "int8": Int8WeightOnlyConfig,
        "int8-dynamic": Int8DynamicActivationInt8WeightConfig,
        "int4": lambda: int4.PrototypeInt4WeightOnlyConfig(group_size=GROUP),
        "int4-dynamic": lambda: int4.Int8DynamicActivationInt4WeightConfig(group_size=GROUP),
    }[variant]()
    quantize_(model, config)
    return repr(config)


def load(args):
    torch.set_num_threads(args.threads)
    dtype = torch.float32 if args.variant == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").eval()
    facts = {"version": f"transformers {transformers.__version__}, torch {torch.__version__}, torchao {torchao.__version__}"}
    if args.variant not in ("float32", "bfloat16"):
        facts["config"] = quantize(model, args.variant)
    prompt = torch.tensor([tokens(args.prompt)])

    @torch.inference_mode()
    def repeat(run: Run) -> None:
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        run.prefilled()
        for token in tokens(args.decode):
            model(torch.tensor([[token]]), past_key_values=cache)

    return repeat, facts


if __name__ == "__main__":
    main("transformers", ["bfloat16", "float32", "int8", "int8-dynamic", "int4", "int4-dynamic"], load)
