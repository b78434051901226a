"""A random order that is computed, not stored: a keyed permutation of [0, size) with O(1) access to any place."""

import hashlib

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def key(seed: int, name: str, epochs: np.ndarray) -> np.ndarray:
    """One 64-bit key for each epoch of the stream `name`. Other names and seeds give unrelated keys."""
    base = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return _mix(np.uint64(int.from_bytes(base, "little")) ^ _mix(np.asarray(epochs).astype(np.uint64)))


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where each `index` in [0, size) goes under its key: a bijection for every key.

    A balanced Feistel network over the next power of four, walked along its cycle until the value falls below
    `size` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 2): < 4 passes on average.
    index, keys: (n,) integers, uint64; returns (n,) int64.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    value, keys = index.astype(np.uint64), np.broadcast_to(keys, index.shape)
    value = _feistel(value, half, keys)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _feistel(value[outside], half, keys[outside])
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & mask)
    return (left << half) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        value = value + _GOLDEN
        value = (value ^ (value >> np.uint64(30))) * _MIX[0]
        value = (value ^ (value >> np.uint64(27))) * _MIX[1]
        return value ^ (value >> np.uint64(31))
