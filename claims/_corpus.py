"""Rows of bytes for small models: Python's standard library, with key-value recall and copy strings mixed in.

A byte is a token, a row is one document. What a seed draws depends on nothing but the seed.
"""

from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from string import ascii_lowercase, digits

import numpy as np

from bloomery.data.pack import Batch, to_batch
from bloomery.data.read import Invalid, read_stdlib

VOCABULARY = 256
HELD_OUT_MODULES, ROWS_A_MODULE = 64, 4
RECALL_SHARE = COPY_SHARE = 0.05

Drawn = tuple[bytes, np.ndarray]
"""A row's bytes and, for each of them, whether it follows from the row before it."""


def batches(seed: int, batch_size: int, length: int) -> Iterator[list[Batch]]:
    """Endless batches of rows of `length` + 1 bytes: 90 % text, 5 % recall, 5 % copies."""
    text, _ = _text(length)
    random, numbers = Random(f"batches {seed}"), np.random.default_rng(seed)
    while True:
        order = numbers.permutation(len(text))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = text[order[start : start + batch_size]].copy()
            for row in rows:
                draw = random.random()
                if draw < RECALL_SHARE + COPY_SHARE:
                    row[:] = _bytes(recall(random, length) if draw < RECALL_SHARE else copying(random, length))
            yield [batch_of(rows)]


def batch_of(rows: np.ndarray, learnt: np.ndarray | None = None) -> Batch:
    """The library's batch of rows (batch, length + 1); each is one document."""
    return to_batch(rows, [np.array([rows.shape[1]], np.int32)] * len(rows), learnt)


def held_out_text(count: int, length: int) -> np.ndarray:
    """(count, length + 1) bytes of modules that no batch holds, at most a few rows of each."""
    return _text(length)[1][:count]


def held_out_strings(make: Callable[[Random, int], Drawn], count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `recall` or `copying`, (count, length + 1), and which of their bytes are answers."""
    drawn = [make(Random(f"held out {number}"), length) for number in range(count)]
    return np.stack([_bytes(row) for row in drawn]), np.stack([answers for _, answers in drawn])


def recall(random: Random, length: int) -> Drawn:
    """Letters with a digit each, then each letter again in another order with its digit: blocks of 2 to 16 pairs.

    Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927). The last block is cut where the row ends.
    """
    text, answers = "", []
    while len(text) <= length:
        pairs = random.choice((2, 4, 8, 16))
        keys = random.sample(ascii_lowercase, pairs)
        values = dict(zip(keys, random.choices(digits, k=pairs), strict=True))
        text += "?" + "".join(key + values[key] for key in keys)
        answers += [False] * (1 + 2 * pairs) + [False, True] * pairs
        text += "".join(key + values[key] for key in random.sample(keys, pairs))
    return text[: length + 1].encode(), np.array(answers[: length + 1])


def copying(random: Random, length: int) -> Drawn:
    """Random words of 4 to 32 letters, each said twice; the last one is cut where the row ends."""
    text, answers = "", []
    while len(text) <= length:
        word = "".join(random.choices(ascii_lowercase, k=random.randint(4, 32)))
        text += f'"{word}"{word}'
        answers += [False] * (len(word) + 2) + [True] * len(word)
    return text[: length + 1].encode(), np.array(answers[: length + 1])


def _bytes(row: bytes | Drawn) -> np.ndarray:
    return np.frombuffer(row if isinstance(row, bytes) else row[0], dtype=np.uint8)


@cache
def _text(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `length` + 1 bytes to train on and to hold out; modules come in an order of hashes, so any is fair.

    Tables of encodings are alike from module to module and left out; so is, from training, any other row that is held
    out.
    """
    documents = [
        one for one in read_stdlib("sources", Invalid()) if not one.metadata["module"].startswith("encodings.")
    ]
    modules = [_rows(document.text.encode(), length) for document in documents]
    modules = [rows for rows in modules if len(rows) >= 2 * ROWS_A_MODULE]
    held_out = np.concatenate([rows[len(rows) // 2 :][:ROWS_A_MODULE] for rows in modules[:HELD_OUT_MODULES]])
    secret = {row.tobytes() for row in held_out}
    others = np.concatenate(modules[HELD_OUT_MODULES:])
    return others[[row.tobytes() not in secret for row in others]], held_out


def _rows(text: bytes, length: int) -> np.ndarray:
    count = (len(text) - 1) // length
    starts = np.arange(count)[:, None] * length
    return _bytes(text)[starts + np.arange(length + 1)]
