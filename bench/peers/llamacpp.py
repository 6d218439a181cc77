"""llama.cpp through llama-cpp-python, built from source for this machine's instructions. The model is a GGUF file; its types are the variant.

Flash attention, which it turns on by itself, makes its prefill 1.4 times as fast and its decoding half as fast with AMX on a 2-core Xeon: each type
has a variant with and one without, and we compare with the better of the two in each phase. Called at the level of `llama_decode`, so no Python and no sampling stands between two steps. Threads come from its OpenMP pool.
"""

from __future__ import annotations

import ctypes

import llama_cpp as lib
from peer import Run, main, tokens

buffers: list[str] = []


@lib.llama_log_callback
def log(level, text, user):  # noqa: ARG001
    line = text.decode(errors="replace").strip()
    if "buffer size" in line or "flash_attn" in line:
        buffers.append(line.split(":", 1)[-1].strip())


def load(args):
    lib.llama_log_set(log, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(args.model.encode(), model_params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {args.model}")
    params = lib.llama_context_default_params()
    params.n_ctx = (args.prompt + args.decode + 255) // 256 * 256
    params.n_batch = params.n_ubatch = max(512, args.prompt)
    params.n_threads = params.n_threads_batch = args.threads
    params.no_perf = True
    flash = args.variant.endswith("-flash")
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    memory = lib.llama_get_memory(context)
    prompt = (lib.llama_token * args.prompt)(*tokens(args.prompt))
    single = (lib.llama_token * 1)()

    def decode(batch) -> None:
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        lib.llama_get_logits_ith(context, -1)  # waits for the result

    def repeat(run: Run) -> None:
        lib.llama_memory_clear(memory, False)
        decode(lib.llama_batch_get_one(prompt, args.prompt))
        run.prefilled()
        for token in tokens(args.decode):
            single[0] = token
            decode(lib.llama_batch_get_one(single, 1))

    facts = {"version": lib.__version__, "features": lib.llama_print_system_info().decode().strip(), "buffers": buffers}
    return repeat, facts


if __name__ == "__main__":
    types = ["q4_0", "q4_k_m", "q8_0", "q4_1"]
    main("llama.cpp", types + [f"{t}-flash" for t in types], load)
