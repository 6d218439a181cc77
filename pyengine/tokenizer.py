"""Text to token ids and back, and chat templates, from what a checkpoint brings along.

Three sources, two back-ends. tokenizer.json runs in `tokenizers` and tokenizer.model in `sentencepiece`; a vocabulary inside a
GGUF file is rebuilt for one of them: "gpt2" (byte-level BPE) as a tokenizer.json, "llama" (scored pieces) as a tokenizer.model.
The beginning-of-text token is added here and not by the back-end, so that both do it alike.
"""

from __future__ import annotations

import functools
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from .chat_template import read_template, render
from .errors import CheckpointError
from .formats import Checkpoint, read_json

# Special tokens that end a turn: no running text contains them, whether or not the configuration lists them.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
TYPES = NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of tokens in GGUF, numbered as in SentencePiece
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's word: GGUF's
# Text is cut into words before merging; by `tokenizer.ggml.pre`. {} is how many digits stay together.
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "default": "gpt2", "gpt-2": "gpt2", "gpt2": "gpt2", "smollm": "digits", "qwen2": "qwen2",
    "llama-bpe": "llama3", "llama3": "llama3", "llama-v3": "llama3",
}  # fmt: skip


class Words:
    """tokenizer.json: everything is `tokenizers`' work."""

    def __init__(self, source: tokenizers.Tokenizer) -> None:
        source.no_truncation()  # some files carry the settings of the training run
        source.no_padding()
        self.source = source
        self.size = max(source.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special = {i for i, token in source.get_added_tokens_decoder().items() if token.special}
        self.prefix = source.encode("", add_special_tokens=True).ids  # what the file's own post-processor adds

    def encode(self, text: str) -> list[int]:
        return self.source.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], special: bool) -> str:
        return self.source.decode(ids, skip_special_tokens=not special)

    def find(self, token: str) -> int | None:
        return self.source.token_to_id(token)


class Pieces:
    """tokenizer.model: `sentencepiece` between the special tokens, which it does not look for in text itself."""

    def __init__(self, model: bytes, added: dict[str, int], special: set[int]) -> None:
        self.model, self.source = model, sentencepiece.SentencePieceProcessor()
        try:
            self.source.LoadFromSerializedProto(model)
            pieces = [self.source.id_to_piece(i) for i in range(self.source.vocab_size())]
        except (RuntimeError, UnicodeDecodeError) as e:
            raise CheckpointError(f"tokenizer.model: damaged or not SentencePiece: {' '.join(str(e).split())}") from e
        self.pieces = len(pieces)
        control = {i for i in range(self.pieces) if self.source.is_control(i)}
        self.added = {pieces[i]: i for i in control} | added
        self.names = {i: token for token, i in self.added.items()}
        self.special = control | special
        self.size = max(self.pieces, *(i + 1 for i in self.names), 0)
        longest_first = sorted(filter(None, self.added), key=len, reverse=True)
        self.split = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.split.split(text):
            ids += [self.added[part]] if part in self.added else self.source.encode(part)
        return ids

    def decode(self, ids: list[int], special: bool) -> str:
        parts, run = [], []
        for i in ids if special else (i for i in ids if i not in self.special):
            if i in self.names:
                parts += [self.source.decode(run), self.names[i]]
                run = []
            elif i < self.pieces:
                run.append(i)
        return "".join((*parts, self.source.decode(run)))

    def find(self, token: str) -> int | None:
        i = self.added.get(token, self.source.piece_to_id(token))
        return i if token in self.added or self.source.id_to_piece(i) == token else None


@dataclass
class Tokenizer:
    """What `load_tokenizer` returns.

    bos_id      put in front of a text when `add_bos`; None where the model has none
    eos_ids     any of these ends a text
    vocab_size  ids of the vocabulary lie below; `limit`, the rows of the embedding, may be larger
    template    Jinja chat template, None for a base model
    config      tokenizer_config.json, with bos_token, eos_token… as text
    generation  generation_config.json
    """

    backend: Words | Pieces
    bos_id: int | None
    eos_ids: set[int]
    add_bos: bool
    limit: int
    template: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.backend.size

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written in it become their ids; `special` adds the beginning-of-text token."""
        if lone := LONE_SURROGATE.search(text):  # what bytes of a command line become that are no UTF-8
            raise ValueError(f"the text is not Unicode: character {lone.start()} is {lone[0]!r}")
        return ([self.bos_id] if special and self.add_bos else []) + self.backend.encode(text)

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Text of token ids, without special tokens unless asked for. ValueError for an id the model cannot produce."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.limit:
            raise ValueError(f"token id {min(ids) if min(ids) < 0 else max(ids)} is out of range for a vocabulary of {self.limit}")
        return self.backend.decode(ids, special)

    def stream(self) -> Stream:
        """A decoder that is given one id at a time."""
        return Stream(self.decode)

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation of {"role", "content"} messages. ValueError without a template or where it fails."""
        if self.template is None:
            raise ValueError("the model has no chat template; it is not a chat model")
        named = {key: value for key, value in self.config.items() if key.endswith("_token") and isinstance(value, str)}
        return render(self.template, messages=messages, add_generation_prompt=add_generation_prompt, **named)

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of `chat(messages)`, with one beginning-of-text token where the model asks for it."""
        ids = self.encode(self.chat(messages), special=False)
        return [self.bos_id, *ids] if self.add_bos and ids[:1] != [self.bos_id] else ids

    def save(self, directory: str | Path) -> None:
        """Write what `load_tokenizer` and transformers' AutoTokenizer need to find in a checkpoint directory."""
        directory = Path(directory)
        if isinstance(self.backend, Words):
            (directory / "tokenizer.json").write_text(self.backend.source.to_str(), encoding="utf-8")
        else:
            (directory / "tokenizer.model").write_bytes(self.backend.model)
        reader = "PreTrainedTokenizerFast" if isinstance(self.backend, Words) else "LlamaTokenizer"
        config = {"tokenizer_class": reader, "clean_up_tokenization_spaces": False} | self.config | {"add_bos_token": self.add_bos}
        config.pop("chat_template", None)
        generation = self.generation | {"bos_token_id": self.bos_id, "eos_token_id": sorted(self.eos_ids)}
        if self.template is not None:
            (directory / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        for file, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
            (directory / file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Stream:
    """Incremental decoding. An id alone has no text: it may be part of a character, and a leading space depends on what is before.

    So the tokens of the last piece of text stay as context, and text is given out once it no longer ends in U+FFFD.
    """

    # A character is at most 4 tokens; a longer run of broken bytes is given out as it is.
    HOLD = 8

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.context: list[int] = []
        self.pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that became complete with this token, often "" inside a character."""
        self.pending.append(token_id)
        new = self._new()
        if not new or (new.endswith("\ufffd") and len(self.pending) < self.HOLD):
            return ""
        self.context, self.pending = self.pending, []
        return new

    def flush(self) -> str:
        """The rest, a broken character as U+FFFD; afterwards the stream is as new."""
        rest, self.context, self.pending = self._new(), [], []
        return rest

    def _new(self) -> str:
        return self.decode(self.context + self.pending)[len(self.decode(self.context)) :]


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint; CheckpointError if it has none, is damaged, or has ids that the embedding lacks."""
    limit = (checkpoint.shapes.get("model.embed_tokens.weight") or (checkpoint.config.get("vocab_size"),))[0]
    if type(limit) is not int:
        raise CheckpointError(f"config.json: vocab_size is {limit!r:.80}, expected a positive integer")
    tokenizer = (_from_gguf if checkpoint.metadata else _from_directory)(checkpoint, limit)
    where = f"the tokenizer of {checkpoint.path.name}"
    for i in {tokenizer.bos_id} - {None} | tokenizer.eos_ids:
        if not 0 <= i < limit:
            raise CheckpointError(f"{where}: special token id {i} is out of range for an embedding of {limit} rows")
    if not 0 < tokenizer.vocab_size <= limit:
        raise CheckpointError(f"{where}: {tokenizer.vocab_size} tokens for an embedding of {limit} rows")
    ends = (tokenizer.backend.find(token) for token in END_OF_TURN)
    tokenizer.eos_ids |= {i for i in ends if i in tokenizer.backend.special}
    return tokenizer


def _from_directory(checkpoint: Checkpoint, limit: int) -> Tokenizer:
    path = checkpoint.path

    def optional(name: str) -> dict[str, Any]:
        return read_json(path / name) if (path / name).exists() else {}

    generation = optional("generation_config.json")
    entries = (*optional("special_tokens_map.json").items(), *optional("tokenizer_config.json").items())
    config = {key: value.get("content", value) if isinstance(value, dict) else value for key, value in entries if value is not None}
    backend = _read_backend(path, config, optional("added_tokens.json"))
    bos_id, eos_id = (_named(backend, config, f"{key}_token") for key in ("bos", "eos"))
    prefix = backend.prefix if isinstance(backend, Words) else [bos_id]
    bos_id = prefix[0] if prefix and bos_id is None else bos_id
    add_bos = bool(config.get("add_bos_token", bos_id in prefix)) and bos_id is not None
    eos_ids = {eos_id} | _id_set(generation.get("eos_token_id")) | _id_set(checkpoint.config.get("eos_token_id"))
    return Tokenizer(backend, bos_id, eos_ids - {None}, add_bos, limit, read_template(path, config), config, generation)


def _read_backend(path: Path, config: dict[str, Any], added: dict[str, Any]) -> Words | Pieces:
    """The back-end for the files of a directory; a tokenizer.model also tells its bos and eos to `config`."""
    if (path / "tokenizer.json").is_file():
        try:
            return Words(tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the package raises plain Exception, and a Rust panic is not even that
            raise CheckpointError(f"tokenizer.json: damaged: {' '.join(str(e).split())}") from e
    if not (path / "tokenizer.model").is_file():
        raise CheckpointError(f"{path}: no tokenizer.json and no tokenizer.model")
    try:
        tokens = {int(key): token for key, token in config.get("added_tokens_decoder", {}).items()}
        added = {token: int(key) for token, key in added.items()} | {token["content"]: key for key, token in tokens.items()}
        special = {key for key, token in tokens.items() if token.get("special")}
        if not all(isinstance(token, str) and key >= 0 for token, key in added.items()):
            raise ValueError("an entry without text or with a negative id")
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"tokenizer_config.json: added tokens are damaged: {e!r}") from e
    backend = Pieces((path / "tokenizer.model").read_bytes(), added, special)
    for key in ("bos", "eos"):
        i = getattr(backend.source, f"{key}_id")()
        if config.get(f"{key}_token") is None and i >= 0:
            config[f"{key}_token"] = backend.source.id_to_piece(i)
    return backend


def _named(backend: Words | Pieces, config: dict[str, Any], key: str) -> int | None:
    token = config.get(key)
    i = backend.find(token) if isinstance(token, str) else None
    if i is None and token is not None:
        raise CheckpointError(f"tokenizer_config.json: {key} {token!r:.80} is not in the vocabulary")
    return i


def _id_set(value: Any) -> set[int | None]:
    """`eos_token_id` of a configuration, an id, a list of ids or null, as a set."""
    ids = value if isinstance(value, list) else [value]
    if not all(i is None or type(i) is int for i in ids):
        raise CheckpointError(f"eos_token_id is {value!r:.80}, expected an id or a list of ids")
    return set(ids)


def _from_gguf(checkpoint: Checkpoint, limit: int) -> Tokenizer:
    get, where = functools.partial(_entry, checkpoint), checkpoint.path.name
    kind, tokens = get("model", str), get("tokens", list)
    types = get("token_type", np.ndarray, np.full(len(tokens), NORMAL)).tolist()
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens) or not set(types) <= set(TYPES):
        raise CheckpointError(f"{where}: {len(types)} types for {len(tokens)} tokens, or unknown types, or a token occurs twice")
    ids = {name: get(f"{key}_token_id", int, None) for name, key in SPECIAL_IDS.items()}
    if any(i is not None and not 0 <= i < len(tokens) for i in (ids["bos"], ids["eos"])):
        raise CheckpointError(f"{where}: special token ids {ids} for {len(tokens)} tokens")
    config = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}
    if kind == "gpt2":
        pre = get("pre", str)
        if pre not in PRE_TOKENIZERS:
            raise CheckpointError(f"{where}: pre-tokenizer {pre!r:.40} is not supported ({', '.join(sorted(PRE_TOKENIZERS))})")
        backend: Words | Pieces = _words(checkpoint, tokens, types, get("merges", list), PRE_TOKENIZERS[pre])
        default_bos = PRE_TOKENIZERS[pre] == "llama3"
    elif kind == "llama":
        backend = Pieces(_sentencepiece_model(checkpoint, tokens, types), {}, set())
        default_bos = True
    else:
        raise CheckpointError(f"{where}: tokenizer type {kind!r:.40} is not supported (gpt2, llama)")
    add_bos = get("add_bos_token", bool, default_bos) and ids["bos"] is not None
    if add_bos and isinstance(backend, Words):  # for other readers of the file that `save` writes
        backend.source.post_processor = processors.TemplateProcessing(single="bos $A", special_tokens=[("bos", ids["bos"])])
    eos_ids = {ids["eos"], get("eot_token_id", int, None), get("eom_token_id", int, None)} - {None}
    template = checkpoint.metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, ids["bos"], eos_ids, add_bos, limit, template if isinstance(template, str) else None, config)


def _entry(checkpoint: Checkpoint, key: str, kind: type, *default: Any) -> Any:
    value = checkpoint.metadata.get(f"tokenizer.ggml.{key}")
    if value is None and default:
        return default[0]
    if type(value) is not kind:
        shown = "missing" if value is None else f"a {type(value).__name__}"
        raise CheckpointError(f"{checkpoint.path.name}: tokenizer.ggml.{key} is {shown}, expected {kind.__name__}")
    return value


def _words(checkpoint: Checkpoint, tokens: list[str], types: list[int], merges: list[str], pre: str) -> Words:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    bad = next((pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys()), None)
    if bad is not None:
        raise CheckpointError(f"{checkpoint.path.name}: merge {' '.join(bad)!r:.80} is not of two tokens that join to a third")
    # Llama 3 takes a word that is a token as it is, even where no merges lead to it.
    source = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama3"))
    if pre in ("gpt2", "digits"):
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "digits" else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        pattern = Regex(CL100K.replace("{}", "{1,3}" if pre == "llama3" else ""))
        steps = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    source.pre_tokenizer = pre_tokenizers.Sequence(steps)
    source.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        source.normalizer = normalizers.NFC()
    added = [(t, kind) for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED) and t]
    source.add_tokens([AddedToken(t, special=kind == CONTROL, normalized=False) for t, kind in added])
    return Words(source)


def _sentencepiece_model(checkpoint: Checkpoint, tokens: list[str], types: list[int]) -> bytes:
    """The tokenizer.model that the vocabulary came from: a protocol buffer, few enough fields to write by hand."""
    scores = _entry(checkpoint, "scores", np.ndarray).astype(np.float32)
    if len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise CheckpointError(f"{checkpoint.path.name}: {len(scores)} scores for {len(tokens)} tokens, or NaN among them")
    if "tokenizer.ggml.precompiled_charsmap" in checkpoint.metadata:
        raise CheckpointError(f"{checkpoint.path.name}: a vocabulary with a character map is not supported")

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    def integer(number: int, value: int) -> bytes:
        return varint(number << 3) + varint(value)

    def message(number: int, *fields: bytes) -> bytes:
        body = b"".join(fields)
        return varint(number << 3 | 2) + varint(len(body)) + body

    piece = (
        message(1, message(1, token.encode()), varint(2 << 3 | 5) + struct.pack("<f", score), integer(3, int(kind)))
        for token, score, kind in zip(tokens, scores.tolist(), types, strict=True)
    )
    prefix = _entry(checkpoint, "add_space_prefix", bool, True)
    squeeze = _entry(checkpoint, "remove_extra_whitespaces", bool, False)
    # trainer_spec: model_type 3 (2 = BPE), byte_fallback 35; normalizer_spec: name 1, dummy prefix 3, squeeze 4, escape 5
    trainer = message(2, integer(3, 2), integer(35, int(BYTE in types)))
    normalizer = message(3, message(1, b"identity"), integer(3, int(prefix)), integer(4, int(squeeze)), integer(5, 1))
    return b"".join((*piece, trainer, normalizer))
