"""What quality filters measure of a text: each value is computed when the first filter asks for it.

Definitions: Gopher (Rae et al. 2021, arXiv 2112.11446, table A1 and section A1.1), C4 (Raffel et al. 2020, arXiv
1910.10683), FineWeb (Penedo et al. 2024, arXiv 2406.17557), Codex (Chen et al. 2021, arXiv 2107.03374).
"""

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from bloomery.data.language import language

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
"""Gopher's eight: English prose of any length has at least two of them."""

_BULLETS = ("-", "*", "•", "●", "‣", "–", "·", "▪")
_ENDINGS = (".", "!", "?", '"', "'", "”", "’", "…", "。", "！", "？", "」", "؟", "।", ":", ";")
_SHORT_LINE = 30
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated automatically|(?:this file|code) (?:is|was) generated|"
    r"do not edit",
    re.IGNORECASE,
)
_HEADER_LINES = 5


class Measures:
    """Counts and shares of one text. Shares are 0 where there is nothing to share."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def characters(self) -> int:
        return len(self.text.strip())

    @cached_property
    def words(self) -> list[str]:
        """What white space separates."""
        return self.text.split()

    @cached_property
    def num_words(self) -> int:
        return len(self.words)

    @cached_property
    def lines(self) -> list[str]:
        """Those that are not empty, without surrounding space."""
        return [line for line in map(str.strip, self.text.splitlines()) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part for part in map(str.strip, re.split(r"\n\s*\n", self.text)) if part]

    @cached_property
    def language(self) -> str:
        return language(self.text)

    @cached_property
    def mean_word_length(self) -> float:
        return float(self._lengths.mean()) if self.words else 0.0

    @cached_property
    def symbol_ratio(self) -> float:
        """Hash signs or ellipses a word, whichever are more."""
        ellipses = self.text.count("...") + self.text.count("…")
        return max(self.text.count("#"), ellipses) / max(1, self.num_words)

    @cached_property
    def alphabetic_words(self) -> float:
        return sum(any(map(str.isalpha, word)) for word in self.words) / max(1, self.num_words)

    @cached_property
    def stop_words(self) -> int:
        """How many different ones of `STOP_WORDS` occur."""
        return len(STOP_WORDS & {word.strip(".,;:!?\"'()").lower() for word in self.words})

    @cached_property
    def bullet_lines(self) -> float:
        return self._share_of_lines([line.startswith(_BULLETS) for line in self.lines])

    @cached_property
    def ellipsis_lines(self) -> float:
        return self._share_of_lines([line.endswith(("...", "…")) for line in self.lines])

    @cached_property
    def punctuated_lines(self) -> float:
        return self._share_of_lines([line.endswith(_ENDINGS) for line in self.lines])

    @cached_property
    def short_lines(self) -> float:
        return self._share_of_lines([len(line) <= _SHORT_LINE for line in self.lines])

    @cached_property
    def mean_line_length(self) -> float:
        return sum(map(len, self.lines)) / max(1, len(self.lines))

    @cached_property
    def line_length(self) -> int:
        """Of the longest line."""
        return max(map(len, self.lines), default=0)

    @cached_property
    def alphanumeric(self) -> float:
        """Share of the characters but white space that are letters or digits."""
        return sum(map(str.isalnum, self.text)) / max(1, int(self._lengths.sum()))

    @cached_property
    def is_generated(self) -> bool:
        """Whether one of the first lines says that a program wrote this file."""
        return any(_GENERATED.search(line) for line in self.lines[:_HEADER_LINES])

    @cached_property
    def repeated_lines(self) -> float:
        return repeated(self.lines)[0]

    @cached_property
    def repeated_line_characters(self) -> float:
        return repeated(self.lines)[1]

    @cached_property
    def repeated_paragraphs(self) -> float:
        return repeated(self.paragraphs)[0]

    @cached_property
    def repeated_paragraph_characters(self) -> float:
        return repeated(self.paragraphs)[1]

    def top_ngram(self, length: int) -> float:
        """Share of the words' characters inside the most frequent run of `length` words; 0 where none comes twice."""
        runs = self._runs(length)
        counts = np.bincount(runs) if len(runs) else np.zeros(1, dtype=int)
        return self._covered(runs == counts.argmax(), length) if counts.max() > 1 else 0.0

    def repeated_ngrams(self, length: int) -> float:
        """Share of the words' characters inside runs of `length` words that have come before."""
        runs = self._runs(length)
        _, first, inverse = np.unique(runs, return_index=True, return_inverse=True)
        return self._covered(first[inverse] != np.arange(len(runs)), length)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self.words), dtype=np.int64, count=len(self.words))

    @cached_property
    def _codes(self) -> dict[int, np.ndarray]:
        known: dict[str, int] = {}
        codes = [known.setdefault(word, len(known)) for word in self.words]
        return {1: np.array(codes, dtype=np.int64)}

    def _runs(self, length: int) -> np.ndarray:
        """(words - length + 1,) a number for every run of words; equal runs have equal numbers."""
        if length not in self._codes:
            shorter, words = self._runs(length - 1), self._codes[1][length - 1 :]
            pairs = shorter[: len(words)] * (int(words.max(initial=0)) + 1) + words
            self._codes[length] = np.unique(pairs, return_inverse=True)[1]
        return self._codes[length]

    def _covered(self, chosen: np.ndarray, length: int) -> float:
        """Share of the words' characters in the chosen runs, each counted once however many runs hold it."""
        edges = np.zeros(self.num_words + 1, dtype=np.int64)
        starts = np.flatnonzero(chosen)
        if not starts.size:
            return 0.0
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + length, -1)
        return float(self._lengths[np.cumsum(edges[:-1]) > 0].sum() / max(1, self._lengths.sum()))

    def _share_of_lines(self, marked: Sequence[bool]) -> float:
        return sum(marked) / max(1, len(marked))


def repeated(parts: Sequence[str]) -> tuple[float, float]:
    """Share of the parts, and of their characters, that repeat an earlier part."""
    if not parts:
        return 0.0, 0.0
    distinct = set(parts)
    return 1 - len(distinct) / len(parts), 1 - sum(map(len, distinct)) / max(1, sum(map(len, parts)))
