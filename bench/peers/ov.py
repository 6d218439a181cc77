"""OpenVINO GenAI with INT4 weights. The model is a directory that `optimum-cli export openvino --weight-format int4` made."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai
from peer import Run, main, tokens


def load(args):
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # or every repetition but the first would find its prompt done
    scheduler.max_num_batched_tokens = max(args.prompt, 256)
    options = {"INFERENCE_NUM_THREADS": args.threads, "PERFORMANCE_HINT": "LATENCY", "ATTENTION_BACKEND": args.variant.upper()}
    if args.variant == "pa":
        options["scheduler_config"] = scheduler
    pipeline = openvino_genai.LLMPipeline(args.model, "CPU", **options)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = args.decode + 1, True  # the first token comes out of the prefill
    ids = np.array([tokens(args.prompt)], dtype=np.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))

    def repeat(run: Run) -> None:
        metrics = pipeline.generate(inputs, config).perf_metrics
        if metrics.get_num_generated_tokens() != args.decode + 1:
            raise RuntimeError(f"wrote {metrics.get_num_generated_tokens()} tokens, expected {args.decode + 1}")
        run.middle = run.start + metrics.get_ttft().mean / 1000

    return repeat, {"version": openvino_genai.__version__}


if __name__ == "__main__":
    main("openvino", ["sdpa", "pa"], load)
