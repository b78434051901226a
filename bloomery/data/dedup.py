"""Removal of repeated documents: equal ones, and with `MinHash` those that are nearly equal."""

import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

from bloomery.config import Config, Field
from bloomery.data.document import Document, Drops, content_hash
from bloomery.data.words import BASE, tokens, window_hashes, word_hashes

_SEED = 2_718_281_828
_RUNS_AT_ONCE = 1024  # so that the products stay in the processor's cache


class ExactDedup:
    """Lets each text through once. One object serves many sources: a text in two of them counts for the first.

    Texts are equal when they differ only in white space and Unicode composition; case counts, as in `x` and `X`.
    Memory: 16 bytes and a set entry for each text kept.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, documents: Iterable[Document], drops: Drops) -> Iterator[Document]:
        """The documents not seen before; the others are counted in `drops`."""
        for document in documents:
            if self.is_new(identity(document.text)):
                yield document
            else:
                drops.add("duplicate", document.id)

    def is_new(self, found: bytes) -> bool:
        """Whether this `identity` comes for the first time; it is remembered."""
        new = found not in self._seen
        self._seen.add(found)
        return new


def identity(text: str) -> bytes:
    """16 bytes; texts that `ExactDedup` calls equal have equal ones."""
    return bytes.fromhex(content_hash(normalized(text)))


def normalized(text: str) -> str:
    """The text with composed characters and single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class MinHashConfig(Config):
    """Near duplicates (Broder 1997): texts that share most of their runs of words."""

    threshold: float = Field(
        default=0.8, description="estimated share of common runs (Jaccard) from which texts are the same", gt=0, le=1
    )
    ngram: int = Field(default=5, description="words of a run", ge=1)
    bands: int = Field(default=14, description="bands of the signature; one that agrees makes a candidate", gt=0)
    rows: int = Field(default=8, description="hashes of a band", gt=0)

    @property
    def num_hashes(self) -> int:
        """Length of a signature."""
        return self.bands * self.rows


def signature(text: str, config: MinHashConfig) -> np.ndarray:
    """(bands · rows,) uint32: for each of as many hash functions the least value over the text's runs of words.

    Two texts agree in a place with the probability of their Jaccard index. A text shorter than a run is one run.
    """
    words = word_hashes(tokens(text))
    runs = np.unique(window_hashes(words, max(1, min(config.ngram, len(words)))))
    if not runs.size:  # no word at all: only its own exact copy is the same
        return np.frombuffer(identity(text) * (config.num_hashes // 4 + 1), dtype=np.uint32)[: config.num_hashes].copy()
    multipliers, offsets = _functions(config.num_hashes)
    least = [
        (multipliers * runs[start : start + _RUNS_AT_ONCE] + offsets).min(axis=1)
        for start in range(0, len(runs), _RUNS_AT_ONCE)
    ]
    return (np.min(least, axis=0) >> np.uint64(32)).astype(np.uint32)


@cache
def _functions(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, 1) odd multipliers and offsets, the same on every machine.

    Of multiply and add modulo 2**64 the upper half is used (Dietzfelbinger 1996, "Universal hashing").
    """
    drawn = np.random.PCG64(_SEED).random_raw(2 * count)[:, None]
    return drawn[:count] | np.uint64(1), drawn[count:]


class NearDedup:
    """Lets a text through unless one that went through before is nearly the same.

    A candidate agrees in one band of its signature; it counts where the whole signatures agree in `threshold` of their
    places. Texts that were dropped are not compared with, so a chain of small changes does not end in another text.
    Memory: about 2 kB for each text kept with the default 14 bands of 8 hashes.
    """

    def __init__(self, config: MinHashConfig):
        self.config = config
        self._candidates: dict[int, int] = {}
        self._kept = np.zeros((1024, config.num_hashes), dtype=np.uint32)
        self._count = 0

    def is_new(self, found: np.ndarray) -> bool:
        """Whether no text with a similar `signature` came before; then it is remembered."""
        new = self.find(found) is None
        if new:
            self.add(found)
        return new

    def find(self, found: np.ndarray) -> int | None:
        """The number, in their order, of a text remembered with a similar `signature`; `None` where there is none."""
        places = {place for band in self._band_keys(found) if (place := self._candidates.get(band)) is not None}
        agreed = self.config.threshold * self.config.num_hashes
        return next((p for p in sorted(places) if np.count_nonzero(self._kept[p] == found) >= agreed), None)

    def add(self, found: np.ndarray) -> None:
        """Remember a `signature`."""
        for band in self._band_keys(found):
            self._candidates.setdefault(band, self._count)
        self._append(found)

    def _band_keys(self, found: np.ndarray) -> list[int]:
        """One 64-bit number a band, of its hashes and its place."""
        keys = np.arange(self.config.bands, dtype=np.uint64)
        for row in found.reshape(self.config.bands, self.config.rows).T:
            keys = keys * BASE + row
        found_keys: list[int] = keys.tolist()
        return found_keys

    def _append(self, found: np.ndarray) -> None:
        if self._count == len(self._kept):
            self._kept = np.concatenate([self._kept, np.zeros_like(self._kept)])
        self._kept[self._count] = found
        self._count += 1
