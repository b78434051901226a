"""Decontamination: documents that share a run of words with a benchmark item are left out, each with the item's name.

The rule of AceReason-Nemotron (arXiv 2505.16400, section 3.1: 9 words for mathematics, 14 for code statements), with
the details that the paper leaves open settled here: NFKC, lower case, words and numbers only.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from bloomery.config import Config, Field
from bloomery.data.document import Document, Drops
from bloomery.data.read import Invalid
from bloomery.data.sources import AnySource
from bloomery.data.words import tokens, window_hashes, word_hashes
from bloomery.errors import ArtifactError

NGRAM = {"math": 9, "code": 14}
"""Words in a row that make a match, by domain."""

SHORTEST_CONTAINED = 4
"""A benchmark item of fewer words than this counts only as a whole line or a whole text: any text may contain it."""

_NUMBER = "0"  # stands for every number; no token is compared with it unmasked
_LONGEST_QUOTE = 200


class DecontaminateConfig(Config):
    """Which benchmarks must not be in the data."""

    benchmarks: list[AnySource] = Field(
        description="sources whose texts are the benchmark items; `columns: {text: …}` names the question", min_length=1
    )
    domain: Literal["math", "code"] = Field(default="math", description="sets `ngram`: 9 for math, 14 for code")
    ngram: int = Field(
        default_factory=lambda data: NGRAM[data["domain"]],
        description="words and numbers in a row that make a match; shorter items are compared whole",
        ge=2,
    )


@dataclass(frozen=True, slots=True)
class Hit:
    """One document that holds part of a benchmark item. `masked`: only with its numbers masked, so it was kept."""

    document: str
    benchmark: str
    item: int
    words: str
    masked: bool


class Decontaminator:
    """Knows the n-grams of benchmark items and lets every document through that holds none of them.

    Memory: 12 bytes an n-gram, kept as 64-bit hashes; texts are not kept. Two different n-grams share a hash with
    probability 2**-64, which among a million n-grams and a billion document n-grams drops a clean text once in 20,000
    such runs. `hits` names what was found: those dropped, and, marked `masked`, renumbered clones, which are kept.
    """

    def __init__(self, ngram: int):
        self.ngram, self.hits = ngram, list[Hit]()
        self._items: list[tuple[str, int]] = []
        self._runs, self._masked, self._whole = _Table(), _Table(), _Table()

    def add(self, benchmark: str, items: Iterable[Document]) -> int:
        """Learn a benchmark's items, numbered from 1; how many there were. Items without a word are passed over."""
        count = 0
        for count, item in enumerate(items, 1):
            words = tokens(item.text)
            if not words:
                continue
            index = len(self._items)
            self._items.append((benchmark, count))
            if len(words) >= SHORTEST_CONTAINED:
                self._runs.add(words, min(self.ngram, len(words)), index)
            else:
                self._whole.add(words, len(words), index)
            if len(words) >= self.ngram:
                self._masked.add(masked := _mask(words), self.ngram, index, _telling(masked, self.ngram))
        return count

    def __call__(self, documents: Iterable[Document], drops: Drops) -> Iterator[Document]:
        """The clean documents; the others are counted in `drops` by benchmark, and listed in `hits` by item."""
        for document in documents:
            hit = self.find(document)
            if hit is not None:
                self.hits.append(hit)
            if hit is None or hit.masked:
                yield document
            else:
                drops.add(f"in benchmark {hit.benchmark}", f"{document.id} holds item {hit.item}")

    def find(self, document: Document) -> Hit | None:
        """The first benchmark item that the document holds; a hit by masked numbers only where there is no other."""
        words = tokens(document.text)
        if (found := self._runs.find(words)) is not None:
            return self._hit(document, words, found, masked=False)
        for part in _parts(document):
            if (found := self._whole.find(short := tokens(part), whole=True)) is not None:
                return self._hit(document, short, found, masked=False)
        if (found := self._masked.find(_mask(words))) is not None:
            return self._hit(document, words, found, masked=True)
        return None

    def _hit(self, document: Document, words: list[str], found: tuple[int, int, int], masked: bool) -> Hit:
        index, start, length = found
        benchmark, item = self._items[index]
        quote = " ".join(words[start : start + length])[:_LONGEST_QUOTE]
        return Hit(document.id, benchmark, item, quote, masked)


def load(config: DecontaminateConfig) -> Decontaminator:
    """A `Decontaminator` that knows the configured benchmarks. Raises `ArtifactError` for one without any item."""
    decontaminator = Decontaminator(config.ngram)
    for source in config.benchmarks:
        drops = Drops()
        if not decontaminator.add(source.name, source.documents("documents", Invalid(source.on_invalid, drops))):
            raise ArtifactError(
                f"benchmark {source.name}: no item could be read from it (dropped: {drops}); "
                "name the column of the question with columns: {text: …}"
            )
    return decontaminator


def _mask(words: list[str]) -> list[str]:
    return [_NUMBER if word.isdigit() else word for word in words]


def _telling(masked: list[str], length: int) -> np.ndarray:
    """(runs,) bool: which runs hold a number, and not mostly numbers; a column of numbers is nobody's question."""
    numbers = np.convolve([word == _NUMBER for word in masked], np.ones(length, dtype=int), "valid")
    return (numbers > 0) & (2 * numbers <= length)


def _parts(document: Document) -> Iterator[str]:
    """What a short item may be the whole of: the text, a line of it, or a message."""
    yield document.text
    yield from document.text.splitlines()
    for name in ("messages", "prompt"):
        yield from (message["content"] for message in document.columns.get(name) or ())


class _Table:
    """Hashes of runs of words, by the length of the run, and the item that each belongs to."""

    def __init__(self) -> None:
        self._new: dict[int, list[tuple[np.ndarray, int]]] = {}
        self._sorted: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, words: list[str], length: int, item: int, chosen: np.ndarray | None = None) -> None:
        """The runs of `length` of an item: all, or those `chosen`."""
        windows = window_hashes(word_hashes(words), length)
        self._new.setdefault(length, []).append((windows if chosen is None else windows[chosen], item))

    def find(self, words: list[str], whole: bool = False) -> tuple[int, int, int] | None:
        """(item, first word, words) of the first run known, or `None`; whole: only a run of all the words."""
        hashed = None
        for length, (known, items) in self._lookup().items():
            if not len(known) or len(words) < length or (whole and len(words) != length):
                continue
            hashed = word_hashes(words) if hashed is None else hashed
            windows = window_hashes(hashed, length)
            places = np.minimum(np.searchsorted(known, windows), len(known) - 1)
            matches = np.flatnonzero(known[places] == windows)
            if matches.size:
                return int(items[places[matches[0]]]), int(matches[0]), length
        return None

    def _lookup(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Sorted hashes and their items by length; what was added since the last look is merged."""
        for length, parts in self._new.items():
            hashes = np.concatenate([windows for windows, _ in parts])
            owners = np.concatenate([np.full(len(windows), item, dtype=np.int32) for windows, item in parts])
            if length in self._sorted:
                hashes, owners = (
                    np.concatenate(pair) for pair in zip(self._sorted[length], (hashes, owners), strict=True)
                )
            known, first = np.unique(hashes, return_index=True)  # the first item that holds a run owns it
            self._sorted[length] = known, owners[first]
        self._new.clear()
        return self._sorted


def as_rows(hits: Iterable[Hit]) -> list[dict[str, object]]:
    """Hits as JSON objects."""
    return [asdict(hit) for hit in hits]
