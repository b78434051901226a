"""Decontamination: documents that share a run of words with a benchmark item are left out, each with the item's name.

The rule of AceReason-Nemotron (arXiv 2505.16400, section 3.1: 9 words for mathematics, 14 for code statements), with
the details that the paper leaves open settled here: NFKC, lower case, words and numbers only.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np

from bloomery.config import Config, Field
from bloomery.data.dedup import MinHashConfig, NearDedup, signature
from bloomery.data.document import Document, Drops
from bloomery.data.read import Invalid
from bloomery.data.runs import NUMBER, Runs, Texts, masked_words
from bloomery.data.sources import AnySource
from bloomery.data.words import tokens
from bloomery.errors import ArtifactError

NGRAM = {"math": 9, "code": 14}
"""Words in a row that make a match, by domain."""

SHORTEST_CONTAINED = 4
"""A benchmark item of fewer words than this counts only as a whole line or a whole text: any text may contain it."""

_LONGEST_QUOTE = 200
_LONGEST_SHORT = 400  # characters of what may be a short item as a whole
_DOCUMENTS_AT_ONCE = 256
_tokens = tokens.__wrapped__  # of thousands of texts in turn nothing is asked for twice


class DecontaminateConfig(Config):
    """Which benchmarks must not be in the data.

    Of questions with options, both are compared, bare and as the prompt shows them, and the options also as a set.
    """

    benchmarks: list[AnySource] = Field(
        description="sources whose texts are the benchmark items; `columns: {text: …}` names the question", min_length=1
    )
    domain: Literal["math", "code"] = Field(default="math", description="sets `ngram`: 9 for math, 14 for code")
    ngram: int = Field(
        default_factory=lambda data: NGRAM[data["domain"]],
        description="words and numbers in a row that make a match; shorter items are compared whole",
        ge=2,
    )
    near: MinHashConfig | None = Field(
        default=None, description="also drop what is nearly the same as a whole item; needed only below a threshold of "
        "about 0.8: texts that are nearer share `ngram` words in a row",
    )  # fmt: skip


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

    Memory: 20 bytes an n-gram, kept as 64-bit hashes; texts are not kept. Two different n-grams share a hash with
    probability 2**-64, which among a million n-grams and a billion document n-grams drops a clean text once in 20,000
    such runs. `hits` names what was found: those dropped, and, marked `masked`, renumbered clones, which are kept.
    near: also what is nearly the same as an item.
    """

    def __init__(self, ngram: int, near: MinHashConfig | None = None):
        self.ngram, self.hits = ngram, list[Hit]()
        self._items: list[tuple[str, int]] = []
        self._runs, self._masked = Runs(), Runs()
        self._whole: dict[tuple[str, ...], int] = {}
        self._option_sets: dict[frozenset[str], int] = {}
        self._near = None if near is None else NearDedup(near)

    def add(self, benchmark: str, items: Iterable[Document]) -> int:
        """Learn a benchmark's items, numbered from 1; how many there were. Items without a word are passed over."""
        count = 0
        for count, item in enumerate(items, 1):
            if words := tokens(item.text):
                self._items.append((benchmark, count))
                self._add(item, words, len(self._items) - 1)
        return count

    def _add(self, item: Document, words: list[str], index: int) -> None:
        if len(words) >= SHORTEST_CONTAINED:
            self._runs.add(words, min(self.ngram, len(words)), index)
        else:
            self._whole.setdefault(tuple(words), index)
        if len(words) >= self.ngram:
            self._masked.add(masked := masked_words(words), self.ngram, index, _telling(masked, self.ngram))
        for options in self._options(item):
            self._option_sets.setdefault(options, index)
        if self._near is not None:
            self._near.add(signature(item.text, self._near.config))

    def __call__(self, documents: Iterable[Document], drops: Drops) -> Iterator[Document]:
        """The clean documents; the others are counted in `drops` by benchmark, and listed in `hits` by item."""
        waiting = iter(documents)
        while some := list(islice(waiting, _DOCUMENTS_AT_ONCE)):
            for document, hit in zip(some, self.find_all(some), strict=True):
                if hit is not None:
                    self.hits.append(hit)
                if hit is None or hit.masked:
                    yield self._marked(document, hit)
                else:
                    drops.add(f"in benchmark {hit.benchmark}", f"{document.id} holds item {hit.item}")

    def _marked(self, document: Document, hit: Hit | None) -> Document:
        """A question says that it was compared, and what with other numbers it is like."""
        if "item" not in document.metadata:
            return document
        found = {"ngram": self.ngram, "hit": hit and f"{hit.benchmark} {hit.item}, renumbered"}
        return replace(document, metadata={**document.metadata, "decontam": found})

    def find(self, document: Document) -> Hit | None:
        """The first benchmark item that the document holds; a hit by masked numbers only where there is no other."""
        return self.find_all([document])[0]

    def find_all(self, documents: Sequence[Document]) -> list[Hit | None]:
        """`find` for many at once, which is several times as fast."""
        texts = [(place, text) for place, document in enumerate(documents) for text in _texts(document)]
        words = [_tokens(text) for _, text in texts]
        hits: dict[int, Hit] = {}
        for masked, known in ((False, self._runs), (True, self._masked)):
            found = known.find_all(Texts.of(words, masked))
            for number, (item, start, length) in sorted(found.items()):
                place = texts[number][0]
                quote = " ".join(words[number][start : start + length])
                hits.setdefault(place, self._hit(documents[place], item, quote, masked))
            if not masked:
                self._find_whole(documents, hits)
        return [hits.get(place) for place in range(len(documents))]

    def _find_whole(self, documents: Sequence[Document], hits: dict[int, Hit]) -> None:
        """By short items, by sets of options, by nearly the same text."""
        for place, document in enumerate(documents):
            if place not in hits and (found := self._whole_item(document)) is not None:
                hits[place] = self._hit(document, *found, masked=False)

    def _whole_item(self, document: Document) -> tuple[int, str] | None:
        for part in _parts(document) if self._whole else ():
            short = tuple(_tokens(part)) if len(part) < _LONGEST_SHORT else ()
            if (item := self._whole.get(short)) is not None:
                return item, " ".join(short)
        for options in self._options(document) if self._option_sets else ():
            if (item := self._option_sets.get(options)) is not None:
                return item, "the same options: " + "; ".join(sorted(options))
        if self._near is not None:
            item = self._near.find(signature(_texts(document)[-1], self._near.config))
            return None if item is None else (item, "nearly the same text")
        return None

    def _options(self, document: Document) -> Iterator[frozenset[str]]:
        """The options as a set, so that their order does not matter: by themselves, unless they are fewer words than
        `ngram` in all, which many questions share (yes and no, 1 to 4), and with their question."""
        options, question = document.metadata.get("options"), document.metadata.get("question")
        found = frozenset(" ".join(_tokens(str(option))) for option in options or ())
        if sum(option.count(" ") + 1 for option in found if option) >= self.ngram:
            yield found
        if found and question:
            yield found | {" ".join((*_tokens(question), "?"))}

    def _hit(self, document: Document, item: int, quote: str, masked: bool) -> Hit:
        benchmark, number = self._items[item]
        return Hit(document.id, benchmark, number, quote[:_LONGEST_QUOTE], masked)


def load(config: DecontaminateConfig) -> Decontaminator:
    """A `Decontaminator` that knows the configured benchmarks. Raises `ArtifactError` for one without any item."""
    decontaminator = Decontaminator(config.ngram, config.near)
    for source in config.benchmarks:
        drops = Drops()
        if not decontaminator.add(source.name, source.documents("documents", Invalid(source.on_invalid, drops))):
            raise ArtifactError(
                f"benchmark {source.name}: no item could be read from it (dropped: {drops}); "
                "name the column of the question with columns: {text: …}"
            )
    return decontaminator


def _telling(masked: list[str], length: int) -> np.ndarray:
    """(runs,) bool: which runs hold a number, and not mostly numbers; a column of numbers is nobody's question."""
    numbers = np.convolve([word == NUMBER for word in masked], np.ones(length, dtype=int), "valid")
    return (numbers > 0) & (2 * numbers <= length)


def _texts(document: Document) -> tuple[str, ...]:
    """The text, and of a question with options both of them without the template, in which letters stand between."""
    question, options = document.metadata.get("question"), document.metadata.get("options")
    return (document.text, "\n".join((question, *options))) if question and options else (document.text,)


def _parts(document: Document) -> Iterator[str]:
    """What a short item may be the whole of: the text, a line of it, or a message."""
    yield document.text
    yield from document.text.splitlines()
    for name in ("messages", "prompt"):
        yield from (message["content"] for message in document.columns.get(name) or ())


def as_rows(hits: Iterable[Hit]) -> list[dict[str, object]]:
    """Hits as JSON objects."""
    return [asdict(hit) for hit in hits]
