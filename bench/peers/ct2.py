"""CTranslate2 with INT8 weights and activations. The model is a directory that its converter made."""

from __future__ import annotations

import json

import ctranslate2
from peer import Run, main, tokens


def load(args):
    generator = ctranslate2.Generator(args.model, device="cpu", compute_type=args.variant, inter_threads=1, intra_threads=args.threads)
    with open(f"{args.model}/vocabulary.json", encoding="utf-8") as f:
        vocabulary = json.load(f)
    prompt = [vocabulary[i] for i in tokens(args.prompt)]

    def repeat(run: Run) -> None:
        count = args.decode + 1  # the first one comes out of the prefill

        def step(result) -> bool:
            if result.step == 0:
                run.prefilled()
            return False

        result = generator.generate_batch(
            [prompt], max_length=count, min_length=count, sampling_topk=1, include_prompt_in_result=False, return_scores=False, callback=step
        )
        if len(result[0].sequences_ids[0]) != count or not run.middle:
            raise RuntimeError(f"wrote {len(result[0].sequences_ids[0])} tokens, expected {count}")

    types = sorted(ctranslate2.get_supported_compute_types("cpu"))
    return repeat, {"version": ctranslate2.__version__, "compute_type": generator.compute_type, "supported": types}


if __name__ == "__main__":
    main("ctranslate2", ["int8"], load)
