"""Rows of a dataset as samples whose gradient is taken: token ids, and which of them are predicted."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bloomery.data.chat import UnsupervisedExample, encode_example
from bloomery.data.dataset import Row, kind_of, read_rows
from bloomery.data.document import Drops
from bloomery.data.pack import IGNORE, Batch
from bloomery.data.tokenizer import Message, Tokenizer


@dataclass(frozen=True)
class Sample:
    """ids (tokens,) int32 and learnt (tokens,) bool; text: what the surface metrics read."""

    id: str
    source: str
    text: str
    ids: np.ndarray
    learnt: np.ndarray

    @property
    def tokens(self) -> int:
        """How many are predicted: the loss is their mean."""
        return int(self.learnt[1:].sum())


def encode_samples(rows: Iterable[Row], tokenizer: Tokenizer, max_tokens: int, drops: Drops) -> Iterator[Sample]:
    """Rows of kind documents, messages, prompts or traces. Only the beginning of a prompt is ever cut (counted in
    `drops` as `prompt cut`, though the sample stays); a sample whose completion does not fit is left out."""
    for row in rows:
        sample = _encode(row, tokenizer)
        if sample is None:
            drops.add("no supervised tokens", row["id"])
            continue
        over = len(sample.ids) - max_tokens
        if over > max(0, int(sample.learnt.argmax()) - 1):
            drops.add(f"completion longer than {max_tokens} tokens", row["id"])
            continue
        if over > 0:
            drops.add(CUT, row["id"])
            sample = Sample(sample.id, sample.source, sample.text, sample.ids[over:], sample.learnt[over:])
        yield sample


CUT = "prompt cut"


def _encode(row: Row, tokenizer: Tokenizer) -> Sample | None:
    chat = _chat(row)
    if chat is None:
        ids = [*tokenizer.encode(row["text"]), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        learnt = [True] * len(ids) if row["text"] else []
        text = row["text"]
    else:
        try:
            ids, learnt = encode_example(tokenizer, chat)
        except UnsupervisedExample:
            return None
        text = "\n".join(message["content"] for message in chat)
    mask = np.array(learnt, dtype=bool)
    if not mask[1:].any():
        return None
    return Sample(row["id"], row["source"], text, np.array(ids, dtype=np.int32), mask)


def _chat(row: Row) -> list[Message] | None:
    """The row as a chat that ends with what is learnt; `None` for a document. A row without an answer has nothing to
    learn."""
    if "text" in row:
        return None
    if "messages" in row:
        return row["messages"]
    answer = row["completion"] if "completion" in row else row["answer"]
    return [*row["prompt"], *([{"role": "assistant", "content": answer}] if answer else [])]


def read_samples(path: Path, tokenizer: Tokenizer, max_tokens: int, drops: Drops) -> Iterator[Sample]:
    """All samples of a dataset folder, in order."""
    return encode_samples(read_rows(path, kind_of(path)), tokenizer, max_tokens, drops)


def batches(samples: Sequence[Sample], pad_id: int, batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """(places in `samples`, batch): rows of about one length together, at most `batch_tokens` with padding, or a single
    one."""
    order = sorted(range(len(samples)), key=lambda place: len(samples[place].ids))
    chosen: list[int] = []
    for place in order:
        if chosen and (len(chosen) + 1) * len(samples[place].ids) > batch_tokens:
            yield chosen, padded([samples[number] for number in chosen], pad_id)
            chosen = []
        chosen.append(place)
    if chosen:
        yield chosen, padded([samples[number] for number in chosen], pad_id)


def padded(samples: Sequence[Sample], pad_id: int) -> Batch:
    """`input_ids` and `labels` (batch, seq): one sample a row, padded at its end, labels shifted by one."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), longest - 1), pad_id, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for row, sample in enumerate(samples):
        tokens = torch.from_numpy(sample.ids.astype(np.int64))
        ids[row, : len(tokens) - 1] = tokens[:-1]
        labels[row, : len(tokens) - 1] = torch.where(torch.from_numpy(sample.learnt[1:]), tokens[1:], IGNORE)
    return {"input_ids": ids, "labels": labels}
