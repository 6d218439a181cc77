"""PyEngine and its peers on the same model, threads and machine, taking turns: `make bench`, or `python bench/compare.py`.

All stay loaded; a round runs, for each peer, ours and the peer's next to each other, in either order by turns. So a ratio is made of two numbers of
the same few seconds, and what is reported is the median of these ratios. Numbers go to bench/results/cpu-<date>.json, where runs of one day add
up, and the plot to bench/results/cpu.png.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]
import environments  # noqa: E402
from machine import commit, machine  # noqa: E402

from pyengine import demo  # noqa: E402
from pyengine.files import cache_folder  # noqa: E402

RESULTS = HERE / "results"
PHASES = ("decode", "prefill")
SECONDS = 600  # for one answer of a peer: far more than any needs, so that a hanging one ends
# The demo model's 576 inputs are 9 · 64: no larger group divides them.
MODELS = {"demo": ("SmolLM2-135M-Instruct", 64), "1b": ("llama-1b-random", 128)}


@dataclass
class Contestant:
    """A variant of a peer, and what it has said and shown so far."""

    peer: str
    script: str
    variant: str
    form: str
    process: subprocess.Popen | None = None
    facts: dict = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})
    speeds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.peer} {self.variant}"

    def start(self, python: Path | str, model: Path, options: list[str], log: Path) -> None:
        """Load the model and warm up; raises PeerError if the peer says that it cannot."""
        command = [python, HERE / "peers" / self.script, "--model", model, "--variant", self.variant, "--serve", *options]
        with open(log, "w") as errors:
            self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        self.facts = self._answer()

    def repeat(self) -> dict:
        self.process.stdin.write(b"run\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        if not select.select([self.process.stdout], [], [], SECONDS)[0]:
            raise environments.PeerError(f"no answer in {SECONDS} s")
        line = self.process.stdout.readline()
        if not line:
            raise environments.PeerError(f"ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise environments.PeerError(answer["error"])
        return answer

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def row(self) -> dict:
        """What the results file holds of it."""
        if self.error:
            return {"error": self.error}
        row = {key: value for key, value in self.facts.items() if key not in ("ready", "peer", "variant")}
        for phase in PHASES:
            row |= {f"{phase}_tok_s": statistics.median(self.speeds[phase]), f"{phase}_runs": self.speeds[phase]}
            if self.ratios[phase]:
                row |= {f"{phase}_ratio": statistics.median(self.ratios[phase]), f"{phase}_ratios": self.ratios[phase]}
        return row


def contestants(size: str) -> list[Contestant]:
    if size == "1b":
        return [Contestant("llama.cpp", "llamacpp.py", v, "gguf") for v in ("q4_0", "q4_0-flash")]
    types = {"q4_0": "q4_0", "q4_k_m": "q4_k_m", "q8_0": "q8_0", "q4_1": "gguf"}
    return [
        *(Contestant("llama.cpp", "llamacpp.py", t + flash, form) for t, form in types.items() for flash in ("", "-flash")),
        *(Contestant("openvino", "ov.py", v, "ov") for v in ("sdpa", "pa")),
        *(Contestant("transformers", "hf.py", v, "hf") for v in ("bfloat16", "float32", "int8", "int8-dynamic", "int4", "int4-dynamic")),
        Contestant("ctranslate2", "ct2.py", "int8", "ct2"),
    ]


def prepare(peers: list[Contestant], ours: Contestant, args: argparse.Namespace, cache: Path) -> list[Contestant]:
    """Set up and start everybody; returns those that run. What fails keeps its reason."""
    name, group = MODELS[args.size]
    options = [f"--{key}={getattr(args, key)}" for key in ("threads", "prompt", "decode")]
    if args.size == "1b":
        checkpoint, gguf = cache / name, cache / f"{name}-q4_0.gguf"
        if not checkpoint.exists() or not gguf.exists():
            subprocess.run([sys.executable, HERE / "random_model.py", checkpoint, gguf], check=True)
    else:
        checkpoint, gguf = demo.quantized(), demo.source()
    ours.start(sys.executable, args.ours or checkpoint, options, cache / "ours.log")
    for peer in peers:
        print(f"starting {peer.name}", file=sys.stderr, flush=True)
        try:
            python = environments.environment(peer.peer, cache)
            peer.start(python, environments.model(peer.form, gguf, name, group, cache), options, cache / f"{peer.peer}-{peer.variant}.log")
        except environments.PeerError as e:
            peer.error = str(e)
            print(f"{peer.name} cannot run: {e}", file=sys.stderr)
    return [peer for peer in peers if not peer.error]


def play(ours: Contestant, running: list[Contestant], rounds: int) -> None:
    """Everybody's repetitions, each peer's next to one of ours."""
    for turn in range(rounds):
        for peer in [p for p in running if not p.error]:
            print(f"\rround {turn + 1} of {rounds}: {peer.name:32}", end="", file=sys.stderr, flush=True)
            numbers = {}
            for one in (ours, peer) if turn % 2 == 0 else (peer, ours):
                try:
                    numbers[one.name] = one.repeat()
                except environments.PeerError as e:
                    if one is ours:
                        raise
                    peer.error = str(e)
                    print(f"\n{peer.name} stopped: {e}", file=sys.stderr)
            if peer.error:
                continue
            for phase in PHASES:
                for one in (ours, peer):
                    one.speeds[phase].append(numbers[one.name][f"{phase}_tok_s"])
                peer.ratios[phase].append(ours.speeds[phase][-1] / peer.speeds[phase][-1])
    print(file=sys.stderr)


def roofline(threads: int) -> dict:
    """What qbench measures of this machine, {} where it is not built."""
    for binary in sorted(HERE.parent.glob("build/*/qbench")):
        done = subprocess.run([binary, "--op", "rmsnorm", "--shape", "1,576", "--threads", str(threads), "--json"], capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout)["machine"]
    return {}


def save(size: str, ours: Contestant, peers: list[Contestant], args: argparse.Namespace) -> dict:
    """Add the rows, each with our commit, to the file of this day, and return its contents."""
    file = RESULTS / f"cpu-{time.strftime('%Y-%m-%d')}.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    if not stored:
        stored = {"machine": machine() | roofline(args.threads), "models": {}}
    model = stored["models"].setdefault(MODELS[size][0], {"rows": {}})
    model |= {key: getattr(args, key) for key in ("threads", "prompt", "decode", "rounds")}
    for one in (ours, *peers):
        model["rows"][one.name] = {"commit": commit()} | one.row()
    file.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"\n{file}", file=sys.stderr)
    return stored


def table(rows: dict[str, dict]) -> None:
    print("\n| | decode, tokens/s | ours is × | prefill, tokens/s | ours is × | MiB |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        if "error" in row:
            print(f"| {name} | cannot run: {row['error']} | | | | |")
            continue
        cells = [f"{row[f'{p}_tok_s']:.0f} | {row[f'{p}_ratio']:.2f}" if f"{p}_ratio" in row else f"{row[f'{p}_tok_s']:.0f} | " for p in PHASES]
        print(f"| {name} | {' | '.join(cells)} | {row['rss_mib']:.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(MODELS), default="demo", help="demo: SmolLM2-135M; 1b: a random model of 1.2 B weights")
    parser.add_argument("--only", default="", help="only the peers whose name contains this")
    parser.add_argument("--ours", type=Path, help="another PyEngine checkpoint of the same shapes")
    for name, default in (("threads", os.cpu_count()), ("prompt", 512), ("decode", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    cache = cache_folder() / "bench"
    cache.mkdir(parents=True, exist_ok=True)
    ours = Contestant("pyengine", "ours.py", "checkpoint", "")
    peers = [c for c in contestants(args.size) if args.only in c.name]
    try:
        running = prepare(peers, ours, args, cache)
        if not running:
            raise environments.PeerError("no peer can run")
        play(ours, running, args.rounds)
    except environments.PeerError as e:
        print(f"compare.py: {e}", file=sys.stderr)
        return 1
    finally:
        for one in (ours, *peers):
            one.stop()
    RESULTS.mkdir(exist_ok=True)
    stored = save(args.size, ours, peers, args)
    table(stored["models"][MODELS[args.size][0]]["rows"])
    import plot

    plot.draw(stored, RESULTS / "cpu.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
