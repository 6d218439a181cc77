"""The `pyengine` command. Results go to stdout, everything else to stderr; exit code 0, 1 with one clear line, or 2 for wrong usage."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, where a full disk or a closed pipe is still ours to report
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, MemoryError) as e:
        print(f"pyengine {args.command}: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        if isinstance(e, OSError):
            _abandon_stdout()
        return 1


def _abandon_stdout() -> None:
    """What stdout still holds cannot be written: the interpreter would try again at exit, fail, and change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyengine", description="Large language models in 4 bits, accurate and fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str, model: str | None = "?") -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(run=run)
        if model:
            p.add_argument("model", nargs=None if model == "1" else model, metavar="MODEL", help=MODEL_HELP)
        p.add_argument("--json", action="store_true", help="one JSON object on stdout")
        if run is not inspect:
            p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
            p.add_argument("--device", default="auto", help="auto or cpu (default auto)")
            asked = "16, 8 or 4 (default: what the checkpoint asks for, else 16)"
            p.add_argument("--act-bits", type=int, help=f"bits of the activations that quantized linears read: {asked}")
            p.add_argument("--kv-bits", type=int, help=f"bits of the KV cache: {asked}")
        return p

    p = command("generate", generate, "Complete a prompt and stream the text.")
    p.add_argument("-p", "--prompt", action="append", required=True, help="the prompt; give it several times for a batch")
    p.add_argument("-n", "--max-new-tokens", type=int, default=128, help="most tokens to write (default 128)")
    p.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template, as a user's message")
    _sampling(p)
    p = command("chat", chat, "Talk with a model; an empty line or end of input leaves.")
    p.add_argument("-n", "--max-new-tokens", type=int, default=512, help="most tokens of an answer (default 512)")
    _sampling(p)
    p = command("quantize", quantize, "Quantize a model into a new PyEngine checkpoint.", model="1")
    _quantization(p)
    _evaluation(command("eval", evaluate, "Perplexity, distance from a reference model, accuracy on multiple-choice questions."))
    command("inspect", inspect, "What a checkpoint holds: architecture, format, bits per weight, outliers, size.")
    p = command("bench", bench, "Prefill and decode speed, bytes per second, memory.")
    for name, default in (("prompt", 512), ("decode", 128), ("batch", 1), ("runs", 5)):
        p.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser


MODEL_HELP = "a Hugging Face directory, a GGUF file or a PyEngine checkpoint (default: the demo model)"


def _sampling(p: argparse.ArgumentParser) -> None:
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--min-p", type=float, default=0.0)
    p.add_argument("--repetition-penalty", type=float, default=1.0)
    p.add_argument("--seed", type=int, help="the same seed gives the same text")
    p.add_argument("--stop", action="append", default=[], help="text that ends the answer; may be given several times")


def _quantization(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", metavar="OUT", help="directory to make")
    p.add_argument("--method", default="gwq", help="a file of pyengine/quant: gwq, gptq, awq, flatquant, auto, ... (default gwq)")
    p.add_argument("--bits", type=int, default=4, help="2, 3, 4 or 8 (default 4)")
    p.add_argument("--bits-map", metavar="FILE", help='JSON {pattern: bits} of linears that have other bits: {"down_proj": 8, "layers.0.*": 8}')
    p.add_argument("--target-bits", type=float, help="auto: bits per weight, all told, that the choice may take")
    p.add_argument("--group-size", type=int, help="inputs that share a scale; 0 is a whole row (default: the method's own, mostly 128)")
    p.add_argument("--asymmetric", action="store_true", help="a zero code for each group")
    p.add_argument("--outliers", type=float, help="share of weights kept in FP16 (default: the method's own, 0.01 for gwq)")
    p.add_argument("--score", help="how outliers are ranked (default: the method's own)")
    p.add_argument("--scope", help="where they are looked for: tensor, global, row, structured or columns (default: the method's own)")
    p.add_argument("--rounding", help="how weights that are not kept are rounded: rtn, gptq, rsq, boa, gpfq, flexround, lrq (default: gptq for gwq, else rtn)")
    p.add_argument("--grid", help="range: scales span a group's weights; search: the cheapest that may clip (default: the method's own)")
    p.add_argument("--orders", type=int, help="rex: matrices that a weight is the sum of (default 2)")
    p.add_argument("--rows", type=float, help="rex: share of the outputs that have more than one (default 0.5)")
    p.add_argument("--head-bits", type=int, default=8, help="bits of the output matrix: 8 or 16 (default 8)")
    p.add_argument("--calib", metavar="FILE", help="UTF-8 calibration text (default: text that the model writes itself)")
    p.add_argument("--samples", type=int, help="calibration windows (default: the method's own, 32 of 512 tokens for gwq)")
    p.add_argument("--seq-len", type=int, help="tokens of a window (default: the method's own)")
    p.add_argument("--steps", type=int, help="training steps of each block, for methods that train; 0 leaves all at its start (default: the method's own)")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(act_bits=16, kv_bits=16)  # recorded in the checkpoint
    p.add_argument("--report", metavar="DIR", help="write there where the FP16 weights sit: outliers.json and, with matplotlib, outliers.png")
    p.add_argument("--resume", action="store_true", help="go on with a run that was cut short")


def _evaluation(p: argparse.ArgumentParser) -> None:
    p.add_argument("--text", metavar="FILE", help="UTF-8 text: perplexity over windows that do not overlap")
    p.add_argument("--tasks", metavar="FILE", nargs="+", default=[], help="JSONL questions: context, choices, answer")
    p.add_argument("--context", type=_integers, metavar="N[,N]", help="windows in tokens (default: 2048, or what the model holds if that is less)")
    p.add_argument("--limit-tokens", type=int, help="only the first tokens of the text")
    p.add_argument("--limit", type=int, help="only the first questions of each file")
    p.add_argument("--reference", metavar="MODEL", help="what the model was made from: KL divergence, agreement and paired differences on --text")
    p.add_argument("--prompts", metavar="FILE", help="with --reference: a prompt a line, for how long greedy continuations stay the same")
    p.add_argument("-n", "--max-new-tokens", type=int, default=64, help="most tokens of a continuation (default 64)")
    p.add_argument("--compare", metavar="MODEL", nargs="+", help="measure several models and print one table")
    p.add_argument("--plot", metavar="FILE", help="with --compare and --text: bits per weight against perplexity, as png, svg or pdf")
    p.set_defaults(usage=p.error)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _load(args: argparse.Namespace, *model: str | None, **bits: int | None):
    """The model of the command line, or another, under the options of the command line or other bits."""
    from .loader import load

    bits = {"act_bits": args.act_bits, "kv_bits": args.kv_bits} | bits
    return load(*(model or (args.model,)), args.device, threads=args.threads, progress=sys.stderr.isatty(), **bits)


def _sampling_of(args: argparse.Namespace) -> dict:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def _print(args: argparse.Namespace, result: dict, lines: Callable[[dict], list[str]]) -> None:
    print(json.dumps(result) if args.json else "\n".join(lines(result)))


def generate(args: argparse.Namespace) -> int:
    from .benchmark import peak_rss_mib, weight_bytes
    from .inspect import linear_bits

    start = time.perf_counter()
    engine = _load(args)
    loaded = time.perf_counter() - start
    prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": p}]) for p in args.prompt] if args.chat else args.prompt
    if len(prompts) == 1 and not args.json:
        text = ""
        for piece in engine.stream(prompts[0], args.max_new_tokens, **_sampling_of(args)):
            text += piece
            print(piece, end="", flush=True)
        print()
        texts, reasons = [text], None
    else:
        done = engine.generate(prompts, args.max_new_tokens, **_sampling_of(args))
        texts, reasons = [c.text for c in done], [c.finish_reason for c in done]
        if not args.json:
            print("\n".join(f"[{i + 1}] {text}" for i, text in enumerate(texts)))
    t = engine.timing
    step = t.seconds / t.steps if t.steps else None
    stats = {
        "tokens": t.tokens,
        "prompt_tokens": t.prompt_tokens,
        "load_s": loaded,
        "prefill_tok_s": t.prompt_tokens / t.prompt_seconds,
        "decode_tok_s": t.decoded / t.seconds if t.steps else None,
        "gb_per_s": weight_bytes(engine) / step / 1e9 if step else None,
        "bits_per_weight": linear_bits(engine.model),
        "rss_mib": peak_rss_mib(),
    }
    if args.json:
        print(json.dumps({"texts": texts, "finish_reasons": reasons, **stats}))
    else:
        speed = f"{stats['decode_tok_s']:.1f} tokens/s, {stats['gb_per_s']:.1f} GB/s of weights" if step else "no decode step"
        print(
            f"\n{t.tokens} tokens: {speed}; prompt {stats['prefill_tok_s']:.0f} tokens/s; {stats['bits_per_weight']:.2f} bits per weight; "
            f"{stats['rss_mib']:.0f} MiB peak memory; loaded in {loaded:.1f} s",
            file=sys.stderr,
        )
    return 0


def chat(args: argparse.Namespace) -> int:
    engine = _load(args)
    messages: list[dict] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            line = ""
        if not line.strip():
            if args.json:
                print(json.dumps({"messages": messages}))
            return 0
        messages.append({"role": "user", "content": line})
        answer = ""
        for piece in engine.stream(engine.tokenizer.encode_chat(messages), args.max_new_tokens, **_sampling_of(args)):
            answer += piece
            if not args.json:
                print(piece, end="", flush=True)
        if not args.json:
            print()
        messages.append({"role": "assistant", "content": answer})


def quantize(args: argparse.Namespace) -> int:
    from . import ops
    from .files import read_json
    from .quantizer import quantize as run

    if args.device not in ("auto", "cpu"):
        raise ValueError(f"device is {args.device!r}; this build quantizes on 'cpu'")
    if args.threads is not None:
        ops.set_threads(args.threads)
    names = (
        "method", "bits", "group_size", "outliers", "score", "scope", "rounding", "grid", "orders", "rows", "target_bits", "act_bits", "kv_bits",
        "head_bits", "calib", "seed", "resume",
    )  # fmt: skip
    options = {name: getattr(args, name) for name in names} | {"symmetric": not args.asymmetric}
    options |= {name: value for name in ("samples", "seq_len", "steps") if (value := getattr(args, name)) is not None}
    if args.bits_map:
        options["bits_map"] = read_json(args.bits_map)
    report = run(args.model, args.out, report_folder=args.report, **options)
    _print(args, report, lambda r: [
        f"{args.out}: {r['method']}, {r['bits_per_weight']:.3f} bits per weight, {100 * r['outlier_share']:.2f} % outliers, "
        f"{r['size_bytes'] / 1e6:.1f} MB, {sum(r['seconds'].values()):.0f} s"
    ])  # fmt: skip
    return 0


def evaluate(args: argparse.Namespace) -> int:
    if not (args.text or args.tasks):
        args.usage("give --text FILE, --tasks FILE or both")
    if args.prompts and not args.reference or args.plot and not (args.compare and args.text):
        args.usage("--prompts needs --reference, and --plot needs --compare and --text")
    if args.reference and not (args.text or args.prompts):
        args.usage("--reference needs --text or --prompts: tasks are not compared with it")
    from . import comparison, plot
    from .files import read_text

    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit is {args.limit}, expected at least 1")
    if args.plot:
        plot.require(args.plot)
    measure = comparison.Measure(
        text=read_text(args.text) if args.text else None,
        contexts=args.context,
        limit_tokens=args.limit_tokens,
        questions=comparison.read_tasks(args.tasks, args.limit),
        prompts=comparison.read_prompts(args.prompts) if args.prompts else (),
        max_new_tokens=args.max_new_tokens,
        progress=not args.json or sys.stderr.isatty(),
    )
    # The bits of the command line are for the models under test: a reference is what it is.
    reference = _load(args, args.reference, act_bits=None, kv_bits=None) if args.reference else None
    if args.compare:
        models = [args.model, *args.compare] if args.model else args.compare
        result = comparison.compare(models, lambda model: _load(args, model), measure, reference)
        _print(args, result, lambda r: comparison.table(r, list(measure.questions)))
        if args.plot:
            points, base = comparison.points(result)
            plot.pareto(points, args.plot, f"{os.path.basename(args.text)}, {args.limit_tokens or 'all'} tokens", base)
        return 0
    engine = _load(args)
    result = measure(engine, reference)
    _print(args, result, comparison.lines)
    return 0


def inspect(args: argparse.Namespace) -> int:
    from . import demo
    from .formats import open_checkpoint
    from .inspect import describe

    result = describe(open_checkpoint(args.model if args.model is not None else demo.quantized()))
    _print(args, result, lambda r: [f"{key:16} {value}" for key, value in r.items()])
    return 0


def bench(args: argparse.Namespace) -> int:
    from .benchmark import measure  # before the clock starts: importing torch takes longer than loading a small model

    start = time.perf_counter()
    engine = _load(args)
    loaded = time.perf_counter() - start
    result = measure(engine, args.prompt, args.decode, args.batch, args.runs) | {"load_s": loaded}
    _print(args, result, lambda r: [
        f"prefill {r['prefill_tok_s']:.1f} tokens/s ({r['prompt']} tokens), decode {r['decode_tok_s']:.1f} tokens/s ({r['decode']} tokens, batch {r['batch']}), "
        f"{r['gb_per_s']:.1f} GB/s, {r['rss_mib']:.0f} MiB, {r['threads']} threads, medians of {r['runs']}; {', '.join(r['kernels'])}",
        *(f"{what}: " + ", ".join(f"{kernel} {share:.1%}" for kernel, share in r[f"{what}_kernels"].items()) for what in ("prefill", "decode")),
        f"{100 * r['outside_kernels']:.1f} % of decoding outside kernels; loaded in {r['load_s']:.2f} s; holds {r['memory_mib']['resident']:.0f} MiB: "
        f"torch {r['memory_mib']['torch']:.0f}, weights {r['memory_mib']['weights']:.0f}, KV cache {r['memory_mib']['kv']:.0f}, other {r['memory_mib']['beyond']:.0f}",
    ])  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
