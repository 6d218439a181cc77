"""`Engine`: a loaded model with its tokenizer. Prompts in, text out, streamed or in batches of unequal length."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .cache import Batch, KVCache
from .formats import Checkpoint
from .sampling import Sampler, Sampling
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .tokenizer import TextStream

CHUNK = 512  # prompt tokens a forward takes at a time: bounds the memory for activations


@dataclass
class Completion:
    """One generated text. finish_reason: "stop" (end token or stop string) or "length"."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str = ""


@dataclass
class Timing:
    """Tokens and seconds of one call of `Engine.generate` or `.stream`."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0  # all that were written
    steps: int = 0  # decode steps, and the sequences in them together; the first token of a text needs none
    decoded: int = 0
    seconds: float = 0.0


class _Text:
    """The text of one sequence as it grows: holds back what may become a stop string or half a character."""

    def __init__(self, stream: TextStream, stop: tuple[str, ...]):
        self.stream, self.stop, self.held, self.stopped = stream, stop, "", False

    def push(self, token: int) -> str:
        return self._release(self.stream.push(token))

    def flush(self) -> str:
        if self.stopped:
            return ""
        text = self._release(self.stream.flush())
        if not self.stopped:
            text, self.held = text + self.held, ""
        return text

    def _release(self, new: str) -> str:
        self.held += new
        cut = min((at for s in self.stop if (at := self.held.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.stopped, text, self.held = True, self.held[:cut], ""
            return text
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text


class Engine:
    """Generates with `model`. Use `pyengine.load` to make one. Not safe for use by several threads at once."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, checkpoint: Checkpoint):
        self.model, self.tokenizer, self.checkpoint = model, tokenizer, checkpoint
        self.timing = Timing()
        self._cache: KVCache | None = None
        self._use = 0

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.model.config.max_position_embeddings

    def generate(self, prompts: str | Sequence[str | Sequence[int]], max_new_tokens: int = 128, **sampling) -> list[Completion]:
        """Complete one prompt or several at once (texts or token ids); see `Sampling` for the options.

        Raises ValueError for prompts that are empty or too long.
        """
        ids = [self._ids(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        done = [Completion() for _ in ids]
        for index, piece in self._run(ids, max_new_tokens, Sampling(**sampling), done):
            done[index].text += piece
        return done

    def stream(self, prompt: str | Sequence[int], max_new_tokens: int = 128, **sampling) -> Iterator[str]:
        """Complete one prompt (text or token ids) and yield the text as it comes."""
        for _, piece in self._run([self._ids(prompt)], max_new_tokens, Sampling(**sampling), [Completion()]):
            if piece:
                yield piece

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits f32[len(ids), vocab] of every position of one sequence."""
        return torch.cat(list(self.logit_chunks(ids)))

    def logit_chunks(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """The same in pieces f32[≤ CHUNK, vocab], for sequences whose logits together would not fit the memory."""
        self._check([list(ids)], 0)
        self.claim()
        yield from self._prefill(list(ids), 0, self.cache_for(1, len(ids)))

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if prompt == "":
            raise ValueError("the prompt is empty: there is nothing to complete")
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def claim(self) -> int:
        """The number of a new use of the KV cache; whoever held it before must not go on."""
        self._use += 1
        return self._use

    def _check(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
        if not prompts:
            raise ValueError("no prompts were given")
        vocab = self.model.config.vocab_size
        for i, ids in enumerate(prompts):
            if not ids:
                raise ValueError(f"prompt {i + 1} of {len(prompts)} is empty: it has no tokens to start from")
            if min(ids) < 0 or max(ids) >= vocab:
                raise ValueError(f"prompt {i + 1} of {len(prompts)} has token {max(ids)}, the vocabulary has {vocab}")
            if len(ids) + (max_new_tokens > 0) > self.context:
                raise ValueError(f"prompt {i + 1} of {len(prompts)} has {len(ids)} tokens, the model's context holds {self.context}")

    def cache_for(self, slots: int, length: int) -> KVCache:
        """The engine's KV cache, made anew where it is too small. `claim` it first."""
        old = self._cache
        if old is None or old.slots < slots or old.length < length:
            self._cache = None  # free it before its successor is allocated
            self._cache = self.model.cache(slots, min(self.context, (length + 255) // 256 * 256))
        return self._cache

    def _prefill(self, ids: list[int], slot: int, cache: KVCache, last_only: bool = False) -> Iterator[Tensor]:
        """Logits of all positions, chunk by chunk, or of the last position alone."""
        for begin in range(0, len(ids), CHUNK):
            part = ids[begin : begin + CHUNK]
            last = begin + len(part) == len(ids)
            wanted = None if not last_only else [len(part) - 1] if last else []
            logits = self.model(Batch.of(part, [slot] * len(part), list(range(begin, begin + len(part))), cache, wanted), cache)
            if last or not last_only:
                yield logits

    def _run(self, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, done: list[Completion]) -> Iterator[tuple[int, str]]:
        """Decode all prompts together; yields (prompt index, new text) and fills in `done` but for its texts."""
        self._check(prompts, max_new_tokens)
        use = self.claim()
        room = [min(max_new_tokens, self.context - len(ids)) for ids in prompts]
        cache = self.cache_for(len(prompts), max(len(ids) + r for ids, r in zip(prompts, room)))
        samplers = [Sampler(sampling, ids, i) for i, ids in enumerate(prompts)]
        texts = [_Text(self.tokenizer.stream(), sampling.stop) for _ in prompts]
        self.timing = timing = Timing(prompt_tokens=sum(map(len, prompts)))

        start = time.perf_counter()
        logits = torch.cat([next(self._prefill(ids, i, cache, last_only=True)) for i, ids in enumerate(prompts)])
        timing.prompt_seconds = time.perf_counter() - start

        active = []
        for i, ids in enumerate(prompts):
            done[i].prompt_tokens, done[i].finish_reason = len(ids), "length"
            if room[i]:
                active.append(i)
        while active:
            for row, i in enumerate(active):
                token = samplers[i].choose(logits[row])
                if token in self.tokenizer.eos_ids:
                    done[i].finish_reason = "stop"
                else:
                    done[i].tokens.append(token)
                    timing.tokens += 1
                    yield i, texts[i].push(token)
                    if texts[i].stopped:
                        done[i].finish_reason = "stop"
                if done[i].finish_reason == "stop" or len(done[i].tokens) == room[i]:
                    yield i, texts[i].flush()
            active = [i for i in active if done[i].finish_reason != "stop" and len(done[i].tokens) < room[i]]
            if active:
                if use != self._use:
                    raise RuntimeError("another text was started on this engine before this one was done; load a second engine for it")
                start = time.perf_counter()
                token = [done[i].tokens[-1] for i in active]
                position = [len(prompts[i]) + len(done[i].tokens) - 1 for i in active]
                logits = self.model(Batch.of(token, active, position, cache), cache)
                timing.seconds += time.perf_counter() - start
                timing.steps += 1
                timing.decoded += len(active)
