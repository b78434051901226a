"""Chats as token ids with the mask of what is learnt: what the assistant wrote, and the end of its turn."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bloomery.data.document import Drops
from bloomery.data.tokenizer import Message, Tokenizer
from bloomery.errors import ArtifactError, BloomeryError, ConfigError

Span = tuple[int, int]


class UnsupervisedExample(BloomeryError):
    """A chat in which nothing is learnt: training on it would do nothing, silently."""


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a chat up to the point where the assistant begins to write."""
    _check(messages)
    return tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))


def encode_example(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Ids of a whole chat, and for each whether it is learnt. A message with `"train": false` is not.

    With `{% generation %}` in the template its marks decide; without, each assistant message is found by rendering
    the chat up to it, and the tokens are compared one by one. Raises `ConfigError` naming what is wrong with the
    template, `UnsupervisedExample` when no token is learnt.
    """
    _check(messages)
    ids, spans = (
        _marked_spans(tokenizer, messages) if tokenizer.marks_generation else _prefix_spans(tokenizer, messages)
    )
    turns = [message for message in messages if message["role"] == "assistant"]
    if len(spans) != len(turns):
        raise ConfigError(
            f"{_name(tokenizer)}: the chat template marks {len(spans)} assistant turns, the chat has {len(turns)}; "
            "put {% generation %} … {% endgeneration %} around each one"
        )
    mask = [False] * len(ids)
    for (start, end), message in zip(spans, turns, strict=True):
        if message.get("train", True):
            mask[start:end] = [True] * (end - start)
    if not any(mask[1:]):  # nothing predicts the first token
        raise UnsupervisedExample("no supervised tokens: the chat has no assistant message that is trained on")
    return ids, mask


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise UnsupervisedExample("no supervised tokens: the chat has no messages")
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ArtifactError(
                f"message {number}: found {dict(message)!r}, expected a 'role' and a 'content', both text"
            )


def _name(tokenizer: Tokenizer) -> str:
    return tokenizer.name or "tokenizer"


def _marked_spans(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
    """Token spans of the template's own marks; a token that lies across a mark's edge belongs to the assistant."""
    text, marks = tokenizer.render_with_spans(messages)
    ids, offsets = tokenizer.encode_with_offsets(text)
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    spans = []
    for start, end in marks:
        inside = np.flatnonzero((starts < end) & (ends > start))
        empty = int(np.searchsorted(starts, start))
        first, last = (int(inside[0]), int(inside[-1]) + 1) if inside.size else (empty, empty)
        spans.append((first, _through_end_of_turn(tokenizer, ids, first, last)))
    return ids, spans


def _through_end_of_turn(tokenizer: Tokenizer, ids: list[int], start: int, end: int) -> int:
    """`end` moved to just behind the token that ends the turn, whether the template marks it or stops before it.

    Without it the model would never learn to stop.
    """
    for position in range(end - 1, start - 1, -1):
        if ids[position] in tokenizer.special_ids:
            if not tokenizer.decode(ids[position + 1 : end]).strip():
                return position + 1
            break
    if end < len(ids) and ids[end] in tokenizer.special_ids:
        return end + 1
    raise ConfigError(
        f"{_name(tokenizer)}: the chat template puts no special token behind the assistant's message, so the model "
        "would never learn to stop; write {{ message.content + eos_token }}"
    )


def _prefix_spans(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
    """Token spans by rendering the chat up to each assistant message, verified against the whole."""
    ids = tokenizer.encode(tokenizer.render(messages))
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.encode(tokenizer.render(messages[:number], add_generation_prompt=True))
            after = tokenizer.encode(tokenizer.render(messages[: number + 1]))
            _verify_prefix(tokenizer, before, ids, number, "the generation prompt before")
            _verify_prefix(tokenizer, after, ids, number, "the chat up to")
            spans.append((len(before), _through_end_of_turn(tokenizer, ids, len(before), len(after))))
    return ids, spans


def _verify_prefix(tokenizer: Tokenizer, prefix: list[int], ids: list[int], number: int, what: str) -> None:
    if ids[: len(prefix)] == prefix:
        return
    place = next(i for i, token in enumerate(prefix) if i >= len(ids) or token != ids[i])
    whole = tokenizer.token(ids[place]) if place < len(ids) else "the end"
    raise ConfigError(
        f"{_name(tokenizer)}: the chat template has no {{% generation %}} marks, and {what} message {number} is not "
        f"how the whole chat begins: token {place} is {tokenizer.token(prefix[place])!r}, in the whole chat {whole!r}. "
        "Add {% generation %} … {% endgeneration %} around the assistant's content in the template"
    )


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Tokens at which generation ends: the end of the text and, given a chat template, of an assistant's turn."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        ids, mask = encode_example(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        found.append(ids[max(position for position, learnt in enumerate(mask) if learnt)])
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Examples:
    """Many encoded chats in flat arrays: example k is [offsets[k], offsets[k+1]).

    ids: (tokens,) int32; learnt: (tokens,) bool; offsets: (examples + 1,) int64;
    sources: (examples,) int16 into `names`.
    """

    ids: np.ndarray
    learnt: np.ndarray
    offsets: np.ndarray
    sources: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(examples,) tokens of each."""
        return np.diff(self.offsets)


def encode_examples(tokenizer: Tokenizer, rows: Iterable[dict[str, Any]], max_tokens: int, drops: Drops) -> Examples:
    """Encode rows of kind `messages`. An example longer than `max_tokens` is dropped, never cut, and so is one without
    supervised tokens; both are counted in `drops`. Raises `ArtifactError` when nothing is left, saying why."""
    ids, learnt, lengths, sources = [], [], [], []
    names: dict[str, int] = {}
    for row in rows:
        try:
            tokens, mask = encode_example(tokenizer, row["messages"])
        except UnsupervisedExample:
            drops.add("no supervised tokens", row["id"])
            continue
        if len(tokens) > max_tokens:
            drops.add(f"longer than {max_tokens} tokens", row["id"])
            continue
        ids.append(np.array(tokens, dtype=np.int32))
        learnt.append(np.array(mask))
        lengths.append(len(tokens))
        sources.append(names.setdefault(row["source"], len(names)))
    if not ids:
        raise ArtifactError(f"no example is left to train on; dropped: {drops}")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Examples(
        np.concatenate(ids), np.concatenate(learnt), offsets, np.array(sources, dtype=np.int16), tuple(names)
    )
