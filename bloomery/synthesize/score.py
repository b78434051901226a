"""What the sketches of a dataset say about its diversity: one table, with what is needed to trust a number in it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bloomery.synthesize import vendi
from bloomery.synthesize.shards import Header, Sketches
from bloomery.synthesize.vendi import Moments

SIZES = (500, 1000, 2000)
_POOL = 10_000  # random rows that subsets are drawn from; a million would not fit in memory
_BINS = 4
_MOST_OF_DIM = 0.25  # above this share of the dimension, the sketch itself limits the score
_SOLVED_NATS, _IGNORANT = 0.05, 0.9


def score(*folders: Path, sizes: Sequence[int] = SIZES, draws: int = 8, seed: int = 0) -> dict[str, Any]:
    """The scores of all sketches in these folders together. Reads them twice, a block at a time.

    `g_vendi` with its 95 % interval, `rarefied` to each of `sizes` (compare datasets by these alone), `ceiling` of as
    many isotropic rows and the share of it, `lambda_1`, `centred`, `order_2`, `lengths`: quarters of the samples by
    predicted tokens, all rarefied to one size, `sources` in nats with what they add to each other, `halves`: the score
    of each half of the sketch, `notes`: why a number may mislead.
    """
    sketches = Sketches(*folders)
    moments = Moments.empty(sketches.header.sketch.dim)
    for rows in sketches.batches():
        moments.add(rows)
    found = of_moments(moments)
    low, high = vendi.interval(moments.density, sketches.batches())
    places = _some(len(sketches), max(_POOL, *sizes), seed)
    pool = _taken(sketches, places)
    losses, tokens = np.array(sketches.column("loss")), np.array(sketches.column("tokens"))
    found |= {
        "interval": (low, high),
        "rarefied": curve(pool, sizes, draws, seed),
        "halves": [vendi.score(vendi.spectrum_of(half)) for half in np.array_split(pool, 2, axis=1)],
        "lengths": by_length(pool, tokens[places], draws, seed),
        "sources": _by_source(pool, [sketches.column("source")[place] for place in places]),
        "perplexity": math.exp(min(float(losses.mean()), 700.0)),
        "gradient_norm": float(np.mean(sketches.column("norm"))),
        "dropped": sketches.dropped,
        "cut": sum(block.cut for block in sketches.blocks),
    }
    return found | {"notes": _notes(found, sketches.header, float(losses.mean()))}


def of_moments(moments: Moments) -> dict[str, Any]:
    """What the moments alone tell."""
    values, dim = vendi.spectrum(moments.density), len(moments.first)
    centred = vendi.spectrum(moments.centred)
    whole, ceiling = vendi.score(values), vendi.ceiling(moments.count, dim)
    return {
        "samples": moments.count, "dim": dim, "g_vendi": whole, "ceiling": ceiling, "of_ceiling": whole / ceiling,
        "lambda_1": float(values[0]), "centred": vendi.score(centred) if len(centred) else 1.0,
        "order_2": vendi.order_two(values),
    }  # fmt: skip


def curve(rows: np.ndarray, sizes: Sequence[int], draws: int, seed: int) -> dict[str, float]:
    """Size → mean score of subsets, for sizes that exist, and `limit`: extrapolated in 1 / n from the two largest where
    one is twice the other."""
    found = {size: vendi.rarefied(rows, size, draws, seed)[0] for size in sizes if size <= len(rows)}
    known = {str(size): value for size, value in found.items()}
    doubled = [size for size in found if size / 2 in found]
    return known | ({"limit": vendi.extrapolated(found[max(doubled) // 2], found[max(doubled)])} if doubled else {})


def by_length(rows: np.ndarray, tokens: np.ndarray, draws: int, seed: int) -> list[dict[str, Any]]:
    """Quarters by predicted tokens, shortest first, each rarefied to the size of the smallest: short completions have
    gradients of their own."""
    parts = [part for part in np.array_split(np.argsort(tokens, kind="stable"), _BINS) if len(part)]
    size = min(map(len, parts))
    return [
        {
            "tokens": (int(tokens[part].min()), int(tokens[part].max())), "size": size,
            "score": vendi.rarefied(rows[part], size, draws, seed)[0],
        }
        for part in parts
    ]  # fmt: skip


def _by_source(rows: np.ndarray, sources: list[str]) -> dict[str, Any]:
    if len(set(sources)) < 2:
        return {}
    whole, own, added = vendi.decomposition(rows, sources)
    return {"entropy": whole, "of_source": own, "between": added}


def _some(count: int, most: int, seed: int) -> np.ndarray:
    """Places of at most `most` random samples, in order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _taken(sketches: Sketches, places: np.ndarray) -> np.ndarray:
    parts, start = [], 0
    for rows in sketches.batches():
        first, last = np.searchsorted(places, [start, start + len(rows)])
        parts.append(rows[places[first:last] - start])
        start += len(rows)
    return np.concatenate(parts)


def _notes(found: dict[str, Any], header: Header, loss: float) -> list[str]:
    notes, dim = [], header.sketch.dim
    if found["g_vendi"] > _MOST_OF_DIM * dim:
        notes.append(
            f"the score is above a quarter of the sketch's {dim} dimensions, which limit it: use a larger dim, "
            "the same for all data"
        )
    if loss < _SOLVED_NATS:
        notes.append(f"the proxy's loss is {loss:.3f} nats: it knows the answers, and gradients are noise")
    if loss > _IGNORANT * math.log(header.vocab_size):
        notes.append(f"the proxy's loss is {loss:.2f} nats, near chance: its gradients tell format from format only")
    if found["cut"]:
        notes.append(f"{found['cut']} prompts lost their beginning")
    return notes
