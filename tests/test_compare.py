"""The comparison with other libraries, without any of them: a peer made up here, the pairing of repetitions, the random model's mask, the plot."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"

PEER = """
import sys, time
sys.path.insert(0, {folder!r})
from peer import main, tokens

def load(args):
    if args.variant == "absent":
        raise ImportError("no such\\nlibrary")
    print("a library that talks")
    left = [2]  # the warm-up and one more

    def repeat(run):
        if args.variant == "dies":
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("out of luck")
        time.sleep(0.01)
        run.prefilled()
        time.sleep(0.02)

    return repeat, {{"version": "1", "prompt_tokens": len(set(tokens(args.prompt)))}}

main("made-up", ["good", "dies", "absent"], load)
"""


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", BENCH / "compare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "made_up.py"
    path.write_text(PEER.format(folder=str(BENCH / "peers")))
    return path


@pytest.fixture
def contestant(compare, script, tmp_path):
    started = []

    def start(name: str, variant: str):
        one = compare.Contestant(name, str(script), variant, "")
        started.append(one)
        one.start(sys.executable, Path("model"), ["--threads=1", "--prompt=100", "--decode=20"], tmp_path / "log")
        return one

    yield start
    for one in started:
        one.stop()


def test_a_peer_prints_one_line(script):
    command = [sys.executable, script, "--model", "m", "--prompt", "100", "--decode", "20", "--runs", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["peer"] == "made-up" and result["variant"] == "good" and result["runs"] == 3 and result["prompt_tokens"] > 50
    assert 5000 < result["prefill_tok_s"] < 10000 and 600 < result["decode_tok_s"] < 1000  # 100 in 10 ms and more, 20 in 20 ms and more
    assert "talks" in done.stderr
    done = subprocess.run([*command, "--variant", "absent"], capture_output=True, text=True)
    assert done.returncode == 1 and json.loads(done.stdout)["error"] == "ImportError: no such library"


def test_rounds_pair_neighbours_and_survive_a_peer_that_stops(compare, contestant, capsys):
    ours, good, dies = contestant("ours", "good"), contestant("a", "good"), contestant("b", "dies")
    compare.play(ours, [good, dies], 3)
    assert "b dies stopped: RuntimeError: out of luck" in capsys.readouterr().err
    assert len(good.ratios["decode"]) == 3 and len(dies.ratios["decode"]) == 1 and len(ours.speeds["decode"]) == 4
    assert good.ratios["prefill"][0] == ours.speeds["prefill"][0] / good.speeds["prefill"][0]
    row = good.row()
    assert row["decode_ratio"] == sorted(good.ratios["decode"])[1] and row["version"] == "1" and row["rss_mib"] > 1
    assert dies.row() == {"error": "RuntimeError: out of luck"}
    with pytest.raises(compare.environments.PeerError, match="no such library"):
        contestant("c", "absent")


def test_ours_that_stops_ends_the_run(compare, contestant):
    ours, good = contestant("ours", "dies"), contestant("a", "good")
    with pytest.raises(compare.environments.PeerError, match="out of luck"):
        compare.play(ours, [good], 3)


def test_a_failing_command_is_one_line_with_its_log(compare, tmp_path):
    with pytest.raises(compare.environments.PeerError, match="making it: failed with code 3: the reason; see"):
        compare.environments._run([sys.executable, "-c", "print('long'); print('the reason'); exit(3)"], tmp_path / "log", "making it")
    assert (tmp_path / "log").read_text() == "long\nthe reason\n"


@pytest.mark.parametrize(("n", "k"), [(576, 576), (4096, 1024)])
def test_the_random_models_mask_is_as_uneven_as_real_ones(n, k):
    pytest.importorskip("tqdm")
    sys.path.insert(0, str(BENCH))
    try:
        from random_model import skewed_mask
    finally:
        sys.path.remove(str(BENCH))
    mask = skewed_mask(n, k, 0.01, torch.Generator().manual_seed(0)).float()
    assert 0.008 < mask.mean() < 0.012
    columns, rows = (mask.sum(dim).sort(descending=True).values for dim in (0, 1))
    assert 0.2 < columns[: max(1, k // 100)].sum() / mask.sum() < 0.7 and 0.04 < rows[: max(1, n // 100)].sum() / mask.sum() < 0.4
    assert 5 < rows[0] / rows.mean() < 100


def test_the_plot_takes_the_best_of_each_library(tmp_path):
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(BENCH))
    try:
        import plot
    finally:
        sys.path.remove(str(BENCH))
    rows = {
        "pyengine checkpoint": {"decode_tok_s": 5.0, "prefill_tok_s": 50.0},
        "x a": {"decode_tok_s": 3.0, "prefill_tok_s": 90.0},
        "x b": {"decode_tok_s": 4.0, "prefill_tok_s": 10.0},
        "y a": {"error": "absent"},
    }
    assert plot.best(rows, "decode") == [("x\nb", 4.0), ("pyengine", 5.0)]
    assert plot.best(rows, "prefill") == [("pyengine", 50.0), ("x\na", 90.0)]
    results = {"machine": {"cpu": "a CPU"}, "models": {"m": {"threads": 2, "prompt": 512, "decode": 128, "rows": rows}}}
    plot.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
