"""Generation on real models: equal to transformers on the same weights, in batches, streamed, seeded, stopped."""

from __future__ import annotations

import pytest
import torch

import pyengine
from pyengine.engine import _Text
from pyengine.evaluate import perplexity
from pyengine.files import read_text
from pyengine.formats import open_checkpoint
from pyengine.loader import build, load
from pyengine.qtensor import QTensor
from pyengine.sampling import Sampler, Sampling, filtered

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time,", "Water boils at", "List three fruits:")
# The text that the model's author published for a greedy run from the empty prompt (llama2.c, doc/stories260K.md).
PUBLISHED = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."


@pytest.fixture(scope="module")
def tiny(stories):
    return load(stories)


def transformers_model(path):
    """The same weights in transformers, through our reader: what is compared is the forward pass."""
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(path)
    config = transformers.LlamaConfig(**{k: v for k, v in checkpoint.config.items() if k != "architectures"})
    model = transformers.LlamaForCausalLM(config).float().eval()
    state = {name: checkpoint.get(name).float() for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def check_against_transformers(engine, model, prompts, tokens, tie=0.0):
    for completion, prompt in zip(engine.generate(prompts, tokens), prompts):
        ids = engine.tokenizer.encode(prompt) + completion.tokens
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].float()
        got = engine.logits(ids)
        assert (got - expected).abs().max() <= 2e-3 * expected.abs().max()
        # Every token is transformers' greedy choice after those before it, so its greedy text is the same; `tie` forgives a choice
        # whose logit is as near to the best one as the bound above.
        chosen = expected[len(ids) - len(completion.tokens) - 1 : len(ids) - 1]
        gap = chosen.amax(1) - chosen.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert gap.max() <= tie * expected.abs().max(), prompt
        assert len(completion.tokens) == tokens or completion.finish_reason == "stop"


def test_the_published_story(tiny):
    assert tiny.tokenizer.bos_id == 1
    text = "".join(tiny.stream([1], 200))
    assert text.startswith(PUBLISHED)


def test_tiny_model_equals_transformers(tiny, stories):
    check_against_transformers(tiny, transformers_model(stories), ["Once upon a time", "The dog", "Lily saw a big red"], 64, tie=2e-3)


def test_real_model_equals_transformers(demo_gguf):
    check_against_transformers(load(demo_gguf), transformers_model(demo_gguf), list(PROMPTS), 64)


@pytest.mark.parametrize("kind", ("llama3", "linear"))
def test_rope_scaling_equals_transformers(kind, stories, tmp_path):
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": "linear", "factor": 4.0}
    if kind == "llama3":
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
        tie_word_embeddings=False, attention_bias=True, mlp_bias=True, rope_parameters={"rope_theta": 10000.0, **scaling},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 512, (150,))
    ours = build(open_checkpoint(tmp_path))
    from pyengine.cache import Batch

    cache = ours.cache(1, 150)
    got = ours(Batch.of(ids.tolist(), [0] * 150, list(range(150)), cache), cache)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    assert (got - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(tiny):
    prompts = ["Once", "The big dog was very happy and", "Lily and her mom went to the park. They", "A"]
    together = tiny.generate(prompts, 40)
    for prompt, c in zip(prompts, together):
        assert tiny.generate(prompt, 40)[0].tokens == c.tokens
        assert "".join(tiny.stream(prompt, 40)) == c.text
        assert c.prompt_tokens == len(tiny.tokenizer.encode(prompt))


def test_the_same_seed_gives_the_same_text_and_another_one_does_not(tiny):
    options = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    first = tiny.generate(["Once upon", "Once upon"], 40, seed=7, **options)
    again = tiny.generate(["Once upon", "Once upon"], 40, seed=7, **options)
    assert [c.tokens for c in first] == [c.tokens for c in again]
    assert first[0].tokens != first[1].tokens  # each prompt of a batch draws for itself
    assert tiny.generate("Once upon", 40, seed=7, **options)[0].tokens == first[0].tokens
    assert tiny.generate("Once upon", 40, seed=8, **options)[0].tokens != first[0].tokens


def test_stop_strings_cut_the_text_even_across_tokens(tiny):
    whole = tiny.generate("Once upon a time", 60)[0].text
    stop = whole[20:31]
    c = tiny.generate("Once upon a time", 60, stop=[stop, "never seen"])[0]
    assert c.text == whole[: whole.index(stop)] and c.finish_reason == "stop"
    assert "".join(tiny.stream("Once upon a time", 60, stop=stop)) == c.text


def test_text_that_may_become_a_stop_string_is_held_back():
    class Letters:
        def push(self, token):
            return chr(token)

        def flush(self):
            return ""

    text = _Text(Letters(), ("abc",))
    assert [text.push(ord(c)) for c in "xabab"] == ["x", "", "", "ab", ""]
    assert text.push(ord("c")) == "" and text.stopped
    text = _Text(Letters(), ("abc",))
    assert text.push(ord("a")) == "" and text.flush() == "a"


def test_prompts_that_cannot_run_are_refused(tiny):
    for arguments, message in (
        (([], 4), "no prompts"),
        (("", 4), None),
        (("word " * 600, 4), "tokens, the model's context holds 512"),
        (("Once", -1), "max_new_tokens is -1"),
    ):
        if message is None:
            with pytest.raises(ValueError, match="prompt 1 of 1 is empty"):
                list(tiny.stream([], 4))
            with pytest.raises(ValueError, match="the prompt is empty"):
                list(tiny.stream("", 4))
            continue
        with pytest.raises(ValueError, match=message):
            tiny.generate(*arguments)
    with pytest.raises(ValueError, match="has token 512, the vocabulary has 512"):
        list(tiny.stream([1, 512], 4))
    with pytest.raises(ValueError, match="top_p is 0"):
        tiny.generate("Once", 4, top_p=0)


def test_a_text_ends_where_the_context_does(tiny):
    ids = tiny.tokenizer.encode("Once upon a time there was a dog. " * 90)[:505]
    assert len(ids) == 505
    c = pyengine_completion(tiny, ids, 100)
    assert len(c) == 512 - 505


def pyengine_completion(engine, ids, n):
    from pyengine.engine import Completion

    done = [Completion()]
    list(engine._run([ids], n, Sampling(), done))
    return done[0].tokens


def test_two_texts_at_once_on_one_engine_are_refused(tiny):
    first = tiny.stream("Once upon a time", 20)
    next(first)
    assert tiny.generate("Lily", 3)[0].text
    with pytest.raises(RuntimeError, match="another text was started"):
        list(first)


def test_a_tiny_temperature_is_greedy(tiny):
    greedy = tiny.generate("Once upon a time", 10)[0].tokens
    assert tiny.generate("Once upon a time", 10, temperature=1e-38, seed=1)[0].tokens == greedy


def test_pyengine_generate(stories):
    one = pyengine.generate("Once upon a time", model=stories, max_new_tokens=12)
    assert isinstance(one, str) and one
    assert pyengine.generate(["Once upon a time"], model=stories, max_new_tokens=12) == [one]


def test_filters_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.generation import logits_process as theirs

    assert transformers
    logits = torch.randn(1, 1000) * 3
    for options in ({"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.05}, {"temperature": 0.5}, {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02}):
        s = Sampling(**{"temperature": 1.0} | options)
        expected = theirs.TemperatureLogitsWarper(s.temperature)(None, logits) if s.temperature != 1 else logits
        if s.top_k:
            expected = theirs.TopKLogitsWarper(s.top_k)(None, expected)
        if s.top_p < 1:
            expected = theirs.TopPLogitsWarper(s.top_p)(None, expected)
        if s.min_p:
            expected = theirs.MinPLogitsWarper(s.min_p)(None, expected)
        assert torch.allclose(filtered(logits[0], s).log_softmax(0), expected[0].log_softmax(0), atol=1e-5), options
    seen = [3, 5, 5, 900]
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits.clone())
    peaked = logits[0].clone()
    peaked[3] = peaked.max() * 1.2
    assert Sampler(Sampling(repetition_penalty=1.3), seen).choose(peaked) == int(
        theirs.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), peaked[None].clone())[0].argmax()
    )
    assert expected[0, 3] != logits[0, 3]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = Sampler(Sampling(temperature=1.0, seed=1), [])
    counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(8000)]), minlength=4)
    assert torch.allclose(counts / 8000, logits.softmax(0), atol=0.02)


def test_perplexity_counts_every_window(tiny, data):
    text = read_text(data / "wikitext2_test.txt")[:6000]
    result = perplexity(tiny, text, context=256)
    ids = tiny.tokenizer.encode(text)
    windows = [ids[i : i + 256] for i in range(0, len(ids), 256)]
    assert result["tokens"] == sum(len(w) - 1 for w in windows if len(w) > 1)
    expected = torch.cat([torch.nn.functional.cross_entropy(tiny.logits(w)[:-1], torch.tensor(w[1:]), reduction="none") for w in windows])
    assert abs(result["nll"] - expected.mean().item()) < 1e-4
    assert perplexity(tiny, text, 256, limit_tokens=300)["tokens"] == 298
    with pytest.raises(ValueError, match="context is 513, expected 2 to 512"):
        perplexity(tiny, text, 513)
    with pytest.raises(ValueError, match="limit_tokens is 1, expected at least 2"):
        perplexity(tiny, text, 256, limit_tokens=1)
    with pytest.raises(ValueError, match="the text has 1 tokens, perplexity needs at least 2"):
        perplexity(tiny, "", 256)


def test_float_perplexity_of_the_real_model(demo_gguf, data):
    """20.258 on four windows and 17.508 on two, from transformers; one window here, its share of the latter in float32: nll 2.5965."""
    result = perplexity(load(demo_gguf), read_text(data / "wikitext2_test.txt")[:12000], limit_tokens=2048)
    assert result["tokens"] == 2047
    assert abs(result["nll"] - 2.5965) <= 0.005


@pytest.mark.parametrize("method", ("rtn", "gwq"))
def test_quantized_perplexity_equals_that_of_the_dequantized_weights(method, demo_gguf, data, tmp_path):
    """The runtime computes what the format says: torch on the dequantized matrices differs by less than 0.3 %."""
    options = {"method": method, "group_size": 64, "score": "abs_w" if method == "gwq" else None}
    pyengine.quantize(demo_gguf, tmp_path / "q", **options)
    engine = load(tmp_path / "q")
    text = read_text(data / "wikitext2_test.txt")[:4000]
    ids = engine.tokenizer.encode(text)[:768]
    model = transformers_model(demo_gguf)
    checkpoint = open_checkpoint(tmp_path / "q")
    kept = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            module = name.removesuffix(".weight")
            if f"{module}.scale" in checkpoint.shapes:
                q = QTensor.read(module, *p.shape, checkpoint.get)
                kept += q.outliers
                p.copy_(q.dequantize())
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:])).exp().item()
    found = perplexity(engine, text, limit_tokens=768)["perplexity"]
    assert abs(found / expected - 1) < 0.003, (found, expected)
    assert (kept > 0) == (method == "gwq")
