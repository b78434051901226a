"""Documents and examples into rows of equal length, and rows into the tensors a model trains on.

A row is `length` token ids and the `lengths` of the documents in it; what they leave over at its end is padding.
A row of seq_len + 1 ids trains seq_len positions, because labels are the ids shifted by one.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from bloomery.errors import ArtifactError

Batch = dict[str, torch.Tensor]
IGNORE = -100


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Which items share a bin: best-fit decreasing (Ding et al. 2024, arXiv 2404.10830). No item is ever cut.

    lengths: each in [1, capacity]. Free space is tracked as one bit per amount, so the tightest bin is one shift away.
    """
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # free space → bins
    available = 0  # bit k: some bin has k places free
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[item])
        fitting = available >> length
        free = capacity
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            number = open_bins[free].pop()
            available &= ~(1 << free) if not open_bins[free] else -1
        else:
            number = len(bins)
            bins.append([])
        bins[number].append(item)
        open_bins[free - length].append(number)
        available |= 1 << (free - length)
    return bins


def split_long(tokens: np.ndarray, length: int) -> list[np.ndarray]:
    """A document in pieces of at most `length` ids. Neighbours share one, so each id but the first is predicted."""
    return [tokens[start : start + length] for start in range(0, max(1, len(tokens) - 1), length - 1)]


def pack_whole(documents: Sequence[np.ndarray], length: int, pad_id: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Whole documents, each at most `length` ids, best-fitted into rows.

    Returns ids (rows, length) int32 and, per row, the lengths of its documents.
    """
    sizes = np.array([len(document) for document in documents])
    bins = best_fit(sizes, length)
    rows = np.full((len(bins), length), pad_id, dtype=np.int32)
    for row, members in zip(rows, bins, strict=True):
        joined = np.concatenate([documents[member] for member in members])
        row[: len(joined)] = joined
    return rows, [sizes[members].astype(np.int32) for members in bins]


def pack_concatenated(documents: Sequence[np.ndarray], length: int, pad_id: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """All documents end to end, cut every `length` − 1 ids: almost no padding, but a document may be cut.

    Neighbouring rows share one id, so that a cut costs no prediction. Returns as `pack_whole`.
    """
    stream = np.concatenate(documents)
    ends = np.cumsum([len(document) for document in documents])
    starts = np.arange(0, max(1, len(stream) - 1), length - 1)
    rows = np.full((len(starts), length), pad_id, dtype=np.int32)
    lengths = []
    for row, start in zip(rows, starts, strict=True):
        stop = min(int(start) + length, len(stream))
        row[: stop - start] = stream[start:stop]
        inner = ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop, "left")]
        lengths.append(np.diff([start, *inner, stop]).astype(np.int32))
    return rows, lengths


def to_batch(
    rows: np.ndarray, lengths: Iterable[np.ndarray], learnt: np.ndarray | None = None, sources: np.ndarray | None = None
) -> Batch:
    """The micro-batch of the contract from packed rows.

    rows: (batch, seq + 1) ids; lengths: per row, of its documents; learnt: (batch, seq + 1) bool, all where `None`;
    sources: (batch,) or (batch, seq + 1) source numbers.
    No label crosses from one document into the next, and none is padding.
    Raises `ArtifactError` when nothing in the batch is learnt.
    """
    starts, filled = _starts(rows.shape, list(lengths))
    allowed = ~starts[:, 1:] & (np.arange(1, rows.shape[1]) < filled[:, None])
    if learnt is not None:
        allowed &= learnt[:, 1:]
    if not allowed.any():
        raise ArtifactError(
            "every label of this batch is masked, so it teaches nothing; check the chat template's generation marks, "
            "and that documents are longer than one token"
        )
    batch = {
        "input_ids": torch.from_numpy(rows[:, :-1].astype(np.int64)),
        "labels": torch.from_numpy(np.where(allowed, rows[:, 1:], IGNORE).astype(np.int64)),
    }
    if starts[:, 1:-1].any():
        batch |= _segments(starts[:, :-1])
    if sources is not None:
        spread = np.broadcast_to(sources.reshape(len(rows), -1), rows.shape)[:, :-1]
        batch["source_ids"] = torch.from_numpy(spread.astype(np.int16))
    return batch


def _starts(shape: tuple[int, int], lengths: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where a document (or the padding) starts, (batch, length) bool; and how much of each row is filled, (batch,)."""
    starts = np.zeros((shape[0], shape[1] + 1), dtype=bool)
    starts[:, 0] = True
    counts = np.array([len(row) for row in lengths])
    flat = np.cumsum(np.concatenate(lengths))
    before = np.concatenate([[0], flat])[np.concatenate([[0], np.cumsum(counts)])]
    row_of = np.repeat(np.arange(shape[0]), counts)
    starts[row_of, flat - before[row_of]] = True
    return starts[:, :-1], np.diff(before)


def _segments(starts: np.ndarray) -> Batch:
    places = np.arange(starts.shape[1])
    begun = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    return {
        "segment_ids": torch.from_numpy(np.cumsum(starts, axis=1, dtype=np.int32) - np.int32(1)),
        "position_ids": torch.from_numpy(places - begun),
    }
