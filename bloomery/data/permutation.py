"""A random order that is computed, not stored: a keyed permutation of [0, size) with O(1) access to any place."""

import hashlib

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def key(seed: int, name: str, epochs: np.ndarray) -> np.ndarray:
    """One 64-bit key for each epoch of the stream `name`. Other names and seeds give unrelated keys."""
    return keys(base(seed, name), epochs)


def base(seed: int, name: str) -> np.uint64:
    """What the keys of all epochs of a stream follow from."""
    return np.uint64(int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little"))


def keys(bases: np.uint64 | np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """The keys of epochs of one stream, or of one each."""
    return _mix(bases ^ _mix(np.asarray(epochs).astype(np.uint64)))


def permute(index: np.ndarray, size: int | np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where each `index` in [0, size) goes under its key: a bijection for every key.

    A Feistel network over the next power of two, whose halves differ by at most a bit and change places every round,
    walked along its cycle until the value falls below `size` (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains", method 2): < 2 passes on average.
    index, keys: (n,) integers, uint64; size: one for all, or (n,); returns (n,) int64.
    """
    sizes = np.asarray(size, dtype=np.uint64)
    bits = np.ceil(np.log2(np.maximum(sizes, 1).astype(np.float64))).astype(np.uint64)
    bits += (np.uint64(1) << bits) < sizes  # above 2^53, where the logarithm is rounded
    low = bits >> np.uint64(1)
    value, keys = index.astype(np.uint64), np.broadcast_to(keys, index.shape)
    value = _feistel(value, bits - low, low, keys)
    outside = np.flatnonzero(value >= sizes)
    part = (lambda field, where: field[where]) if sizes.ndim else (lambda field, where: field)
    while outside.size:
        halves = part(bits - low, outside), part(low, outside)
        value[outside] = _feistel(value[outside], *halves, keys[outside])
        outside = outside[value[outside] >= part(sizes, outside)]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, high: np.ndarray, low: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """high, low: bits of the halves. The number of rounds is even, so that they end where they were."""
    one = np.uint64(1)
    masks = (one << high) - one, (one << low) - one
    left, right = value >> low, value & masks[1]
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & masks[number % 2])
    return (left << low) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        value = value + _GOLDEN
        value = (value ^ (value >> np.uint64(30))) * _MIX[0]
        value = (value ^ (value >> np.uint64(27))) * _MIX[1]
        return value ^ (value >> np.uint64(31))
