"""Evaluation: scores equal to those of transformers, errors equal to their definitions, several models in one table."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from test_generate import transformers_model

from pyengine import cli, evaluate, plot, tasks
from pyengine.cache import KVCache
from pyengine.files import read_text
from pyengine.loader import load


@pytest.fixture(scope="module")
def tiny(stories):
    return load(stories)


@pytest.fixture(scope="module")
def theirs(stories):
    return transformers_model(stories)


@pytest.fixture(scope="module")
def rounded(stories, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "stories-rtn"
    assert cli.main(["quantize", str(stories), str(out), "--method", "rtn", "--group-size", "32", "--json"]) == 0
    return out


@pytest.fixture
def text_file(data, tmp_path):
    file = tmp_path / "text"
    file.write_text(read_text(data / "wikitext2_test.txt")[:3000])
    return file


def command(capfd, *arguments) -> dict:
    capfd.readouterr()
    assert cli.main([str(a) for a in (*arguments, "--json")]) == 0
    return json.loads(capfd.readouterr().out)


def transformers_scores(model, tokenizer, item: dict) -> list[float]:
    """log p of each choice, every one in a forward pass of its own: lm-eval's definition, whose trailing spaces our texts do not have."""
    context, scores = tokenizer.encode(item["context"]), []
    for choice in item["choices"]:
        whole = tokenizer.encode(item["context"] + choice)
        with torch.inference_mode():
            p = model(torch.tensor([whole])).logits[0].log_softmax(1)
        scores.append(sum(p[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
    return scores


def test_choices_equal_those_of_transformers(tiny, theirs, data):
    for name in ("arc_easy", "hellaswag", "openbookqa"):
        items = tasks.read_task(data / "tasks" / f"{name}.jsonl")[:10]
        expected = [transformers_scores(theirs, tiny.tokenizer, item) for item in items]
        got = iter(tasks._losses(tiny, tasks._groups(tiny, items, [])))
        right = right_norm = 0
        for item, scores in zip(items, expected):
            ours = [-next(got) for _ in scores]
            assert ours == pytest.approx(scores, abs=0.02 * len(scores))
            assert ours.index(max(ours)) == scores.index(max(scores)), item
            by_byte = [s / len(c[1:].encode()) for s, c in zip(scores, item["choices"])]
            right += scores.index(max(scores)) == item["answer"]
            right_norm += by_byte.index(max(by_byte)) == item["answer"]
        result = tasks.multiple_choice(tiny, items)
        assert (result["acc"], result["acc_norm"], result["n"]) == (right / 10, right_norm / 10, 10)
        values = torch.tensor([1.0] * right + [0.0] * (10 - right))
        assert result["acc_stderr"] == pytest.approx(values.std().item() / 10**0.5)


def test_a_sure_answer_is_found(tiny):
    sure = [{"context": "Once upon a", "choices": [" time", " zebra xylophone"], "answer": 0}] * 3
    assert tasks.multiple_choice(tiny, sure) == {"acc": 1.0, "acc_stderr": 0.0, "acc_norm": 1.0, "acc_norm_stderr": 0.0, "n": 3}
    assert tasks.multiple_choice(tiny, [s | {"answer": 1} for s in sure])["acc"] == 0
    assert tasks.multiple_choice(tiny, sure[:1])["acc_stderr"] is None


def test_unusual_questions(tiny, theirs):
    """More choices than run together, choices that begin alike, of one token, after an empty context; and contexts that are too long."""
    many = [f" the {word} dog" for word in ("big", "red", "sad", "old", "small", "happy")] * 4
    items = [
        {"context": "Lily saw", "choices": many, "answer": 0}, {"context": "", "choices": ["Once upon", "Zebra"], "answer": 0},
        {"context": "Lily saw a", "choices": [" dog", " dog and a cat"], "answer": 0}, {"context": "a", "choices": [" b", "b"], "answer": 0},
    ]  # fmt: skip
    got = list(tasks._losses(tiny, tasks._groups(tiny, items, [])))
    expected = [s for item in items for s in transformers_scores(theirs, tiny.tokenizer, item)]
    assert [-x for x in got[:-1]] == pytest.approx(expected[:-1], abs=0.05)
    long = [{"context": "Once upon a time there was a dog. " * 90, "choices": [" It", " Zebra xylophone"], "answer": 0}]
    result = tasks.multiple_choice(tiny, long)
    assert (result["acc"], result["cut"]) == (1.0, 1)
    with pytest.raises(ValueError, match="does not fit the model's context of 512"):
        tasks.multiple_choice(tiny, [{"context": "a", "choices": [" dog" * 600, " b"], "answer": 0}])


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: Expecting"), ("[1]", "line 2"), ('{"context": "a", "choices": ["b"], "answer": 0}', "line 2: .*at least two"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "line 2: answer 2 is not an index"), ('{"context": "a"}', "line 2: 'choices' is missing"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "answer True"), ('{"context": "a", "choices": "bc", "answer": 0}', "at least two"),
        ('{"context": 1, "choices": ["b", "c"], "answer": 0}', "context must be a string"), ("[" * 100_000, "line 2"),
    ],
)  # fmt: skip
def test_malformed_questions_are_one_line(line, message, tmp_path, capfd):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        tasks.read_task(file)
    assert cli.main(["eval", "nothing", "--tasks", str(file)]) == 1
    out, err = capfd.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1 and f"{file}, line 2" in err


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_copied_slot_is_the_slot(bits):
    cache = KVCache(2, 4, 2, 16, 8, bits)
    for t in cache.tensors:
        t.copy_(torch.arange(t.numel()).view(t.shape) % 100)
    before = [t.clone() for t in cache.tensors]
    cache.copy(1, slice(2, 4), 5)
    assert len(before) == {4: 3, 8: 2, 16: 1}[bits]
    for now, then in zip(cache.tensors, before):
        assert torch.equal(now[:, :, 2:4, :, :5], then[:, :, 1:2, :, :5].expand_as(now[:, :, 2:4, :, :5]))
        assert torch.equal(now[:, :, :2], then[:, :, :2]) and torch.equal(now[:, :, 2:, :, 5:], then[:, :, 2:, :, 5:])


def test_standard_errors():
    """With pieces of one token it is the textbook's; tokens that repeat their neighbour carry no more than one does."""
    values = torch.randn(4000)
    mean, error = evaluate.mean_and_error(values.repeat_interleave(evaluate.PIECE))
    assert mean == pytest.approx(values.double().mean().item()) and error == pytest.approx((values.std() / 4000**0.5).item(), rel=1e-4)
    assert evaluate.mean_and_error(values[:256])[1] is None
    independent = evaluate.mean_and_error(torch.randn(200_000))[1]
    assert independent == pytest.approx(200_000**-0.5, rel=0.1)


def test_divergence_equals_its_definition(tiny, rounded, text_file):
    other = load(rounded)
    windows = evaluate.text_windows(tiny, read_text(text_file), 256, 700)
    scores = evaluate.score(other, windows, tiny)
    p, q = (torch.cat([e.logits(w)[:-1].double().log_softmax(1) for w in windows]) for e in (other, tiny))
    target = torch.cat([torch.tensor(w[1:]) for w in windows])
    assert torch.allclose(scores.loss.double(), torch.nn.functional.nll_loss(p, target, reduction="none"), atol=1e-4)
    assert torch.allclose(scores.reference_loss.double(), torch.nn.functional.nll_loss(q, target, reduction="none"), atol=1e-4)
    assert torch.allclose(scores.divergence.double(), (q.exp() * (q - p)).sum(1), atol=1e-4)
    assert torch.equal(scores.same, p.argmax(1) == q.argmax(1)) and 0.3 < scores.same.float().mean() < 1
    found = evaluate.summary(scores)
    assert found["nll_difference"] == pytest.approx(found["nll"] - math.log(found["reference_perplexity"]))
    assert 0 < found["nll_difference_standard_error"] < found["nll_standard_error"] and found["kl"] > 0
    alone = evaluate.summary(evaluate.score(tiny, windows))
    assert evaluate.summary(evaluate.score(other, windows), scores.reference_loss)["nll_difference"] == pytest.approx(found["nll_difference"], abs=1e-5)
    assert alone["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-5)


def test_a_model_does_not_differ_from_itself(tiny, stories, text_file):
    again = load(stories)
    found = evaluate.summary(evaluate.score(again, evaluate.text_windows(tiny, read_text(text_file), 256), tiny))
    assert (found["nll_difference"], found["kl"], found["top1"]) == (0.0, 0.0, 1.0)
    drift = evaluate.drift(again, tiny, ["Once upon a time", "Lily"], 20)
    assert drift["exact_match"] == 1 and drift["first_divergences"] == [20, 20]


def test_drift_finds_the_first_difference(tiny, rounded):
    other, prompts = load(rounded), ["Once upon a time", "The dog", "One day, a girl named Lily", *"ABCDEF"]  # more than run together
    found = evaluate.drift(other, tiny, prompts, 20)
    for prompt, at in list(zip(prompts, found["first_divergences"], strict=True))[:3]:
        a, b = (e.generate(prompt, 20)[0].tokens for e in (other, tiny))
        assert a[:at] == b[:at] and (a == b if at == len(a) == len(b) else a[at : at + 1] != b[at : at + 1])
    assert 0 <= found["exact_match"] < 1 and found["first_divergence"] == pytest.approx(sum(found["first_divergences"]) / 9)


def test_the_command_against_a_reference(capfd, stories, rounded, text_file, tmp_path, data):
    prompts = tmp_path / "prompts"
    prompts.write_text("Once upon a time\n\nLily\n")
    task = data / "tasks" / "openbookqa.jsonl"
    options = ("--text", text_file, "--context", "128,256", "--reference", stories, "--prompts", prompts, "-n", 8, "--tasks", task, "--limit", 2)
    found = command(capfd, "eval", rounded, *options)
    assert set(found) == {"contexts", "drift", "openbookqa"} and set(found["contexts"]) == {"128", "256"}
    assert found["contexts"]["256"]["tokens"] > found["contexts"]["128"]["tokens"] and found["drift"]["prompts"] == 2
    assert cli.main([str(a) for a in ("eval", rounded, *options)]) == 0
    out = capfd.readouterr().out
    assert "perplexity at 128" in out and "KL" in out and "drift" in out and "openbookqa: acc" in out


def test_models_side_by_side(capfd, stories, rounded, text_file, tmp_path, data):
    options = ("--text", text_file, "--context", 256, "--limit-tokens", 600)
    plain = command(capfd, "eval", "--compare", stories, rounded, *options)
    assert "nll_difference" not in plain["rows"][0] and plain["rows"][1]["nll_difference"] > 0 and plain["reference"] is None
    assert plain["rows"][0]["bits_per_weight"] == 32 and 4 < plain["rows"][1]["bits_per_weight"] < 6
    against = command(capfd, "eval", "--compare", rounded, "--reference", stories, *options)
    row = against["rows"][0]
    assert row["nll_difference"] == pytest.approx(plain["rows"][1]["nll_difference"], abs=1e-6) and row["kl"] > 0 and row["size_bytes"] > 1e5
    codes = command(capfd, "eval", stories, "--reference", stories, "--kv-bits", 8, *options)
    assert 0 < codes["kl"] < 0.01  # the reference keeps its 16 bits
    pytest.importorskip("matplotlib")
    drawn, task = tmp_path / "plot.png", data / "tasks" / "openbookqa.jsonl"
    assert cli.main([str(a) for a in ("eval", "--compare", stories, rounded, "--plot", drawn, "--tasks", task, "--limit", 2, *options)]) == 0
    lines = capfd.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1 and drawn.read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_compared(capfd, tiny, stories, rounded, text_file, tmp_path, monkeypatch, demo_gguf):
    def fails(*arguments) -> str:
        capfd.readouterr()
        assert cli.main([str(a) for a in ("eval", *arguments)]) == 1
        out, err = capfd.readouterr()
        assert out == "" and len(err.strip().splitlines()) == 1, err
        return err

    text = ("--text", text_file, "--limit-tokens", 100)
    assert "a vocabulary of 512 tokens cannot be compared with the reference's of 49152" in fails(rounded, *text, "--reference", demo_gguf)
    assert "does not exist" in fails("--compare", stories, *text, "--plot", tmp_path / "no" / "plot.png")
    assert "ends in .png, .svg, .pdf" in fails("--compare", stories, *text, "--plot", tmp_path / "plot.txt")
    task = tmp_path / "t.jsonl"
    task.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}')
    assert "another task named 't'" in fails(stories, "--tasks", task, task)
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert "has no prompts" in fails(stories, "--prompts", empty, "--reference", stories, *text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="a plot needs matplotlib, which is not installed"):
        plot.require("plot.png")
    for wrong in (("--plot", "p.png"), ("--prompts", "b"), ("--context", "x")):
        with pytest.raises(SystemExit) as caught:
            cli.main(["eval", "m", "--text", "a", *wrong])
        assert caught.value.code == 2
