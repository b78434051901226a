"""Words of a text and hashes of runs of them: what decontamination, near duplicates and quality scores compare."""

import hashlib
import re
import unicodedata
from functools import lru_cache

import numpy as np

_TOKEN = re.compile(r"\d+|[^\W\d_]+")
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of polynomial hashes modulo 2**64: odd, so that its powers never vanish."""


@lru_cache(maxsize=2)  # several filters in turn ask for the words of the same text
def tokens(text: str) -> list[str]:
    """Words and numbers after NFKC in lower case; not to be changed. `x²`, `x^2` and `X 2` all give x, 2."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(words: list[str]) -> np.ndarray:
    """(words,) uint64, the same on every machine."""
    return np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))


def window_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """(words - length + 1,) polynomial hashes modulo 2**64 of every run of `length` words."""
    count = len(words) - length + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    hashes = words
    for known in range(1, length):
        hashes = extended(hashes, words, known)
    return hashes


def extended(windows: np.ndarray, words: np.ndarray, length: int) -> np.ndarray:
    """The hashes of runs of one word more, from those of runs of `length` words."""
    return windows[: max(0, len(words) - length)] * BASE + words[length:]
