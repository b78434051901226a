"""Runs of words by their hashes: which of many texts hold a run that is known, and whose it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bloomery.data.words import extended, window_hashes, word_hashes

NUMBER = "0"
"""Stands for every number where numbers are masked; no word is compared with it unmasked."""

_SLOTS_PER_RUN = 8  # of the quick test; one in eight unknown runs passes it


@dataclass(frozen=True)
class Texts:
    """Words of many texts in one array: text k is [starts[k], starts[k + 1]). hashes: (words,) uint64."""

    hashes: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[list[str]], masked: bool = False) -> "Texts":
        """masked: with every number as `NUMBER`."""
        words = [word for text in texts for word in text]
        hashes = word_hashes(masked_words(words) if masked else words)
        return cls(hashes, np.cumsum([0, *map(len, texts)]))


def masked_words(words: Sequence[str]) -> list[str]:
    """Every number as `NUMBER`."""
    return [NUMBER if word.isdigit() else word for word in words]


class Runs:
    """Runs of words and the item that each belongs to. Memory: about 20 bytes a run."""

    def __init__(self) -> None:
        self._new: dict[int, list[tuple[np.ndarray, int]]] = {}
        self._known: dict[int, _Known] = {}

    def add(self, words: list[str], length: int, item: int, chosen: np.ndarray | None = None) -> None:
        """The runs of `length` of an item: all, or those `chosen`."""
        windows = window_hashes(word_hashes(words), length)
        self._new.setdefault(length, []).append((windows if chosen is None else windows[chosen], item))

    def find_all(self, texts: Texts) -> dict[int, tuple[int, int, int]]:
        """Text → (item, first word, words) of the first run known in it, the shorter runs before the longer."""
        found: dict[int, tuple[int, int, int]] = {}
        windows, length = texts.hashes, 1
        for wanted, known in self._lookup():
            while length < wanted:
                windows, length = extended(windows, texts.hashes, length), length + 1
            self._find(known, windows, length, texts.starts, found)
        return found

    def _find(
        self, known: "_Known", windows: np.ndarray, length: int, starts: np.ndarray,
        found: dict[int, tuple[int, int, int]],
    ) -> None:  # fmt: skip
        places, items = known.find(windows)
        owners = np.searchsorted(starts, places, side="right") - 1
        inside = places + length <= starts[owners + 1]  # no run goes on in the next text
        for text, place, item in zip(
            owners[inside].tolist(), places[inside].tolist(), items[inside].tolist(), strict=True
        ):
            found.setdefault(text, (item, place - int(starts[text]), length))

    def _lookup(self) -> list[tuple[int, "_Known"]]:
        """By length; what was added since the last look is merged."""
        for length, parts in self._new.items():
            hashes = np.concatenate([windows for windows, _ in parts])
            owners = np.concatenate([np.full(len(windows), item, dtype=np.int32) for windows, item in parts])
            if (before := self._known.get(length)) is not None:
                hashes, owners = np.concatenate([before.hashes, hashes]), np.concatenate([before.items, owners])
            self._known[length] = _Known.of(hashes, owners)
        self._new.clear()
        return sorted(self._known.items())


@dataclass(frozen=True)
class _Known:
    """Sorted hashes of runs of one length, their items, and a table that most unknown hashes are not in."""

    hashes: np.ndarray
    items: np.ndarray
    maybe: np.ndarray

    @classmethod
    def of(cls, hashes: np.ndarray, items: np.ndarray) -> "_Known":
        hashes, first = np.unique(hashes, return_index=True)  # the first item that holds a run owns it
        maybe = np.zeros(1 << (_SLOTS_PER_RUN * len(hashes) + 1).bit_length(), dtype=bool)
        maybe[hashes & np.uint64(len(maybe) - 1)] = True
        return cls(hashes, items[first], maybe)

    def find(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the windows that are known, and their items."""
        places = np.flatnonzero(self.maybe[windows & np.uint64(len(self.maybe) - 1)])
        if not places.size or not len(self.hashes):
            return places[:0], self.items[:0]
        at = np.minimum(np.searchsorted(self.hashes, windows[places]), len(self.hashes) - 1)
        same = self.hashes[at] == windows[places]
        return places[same], self.items[at[same]]
