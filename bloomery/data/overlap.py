"""Documents that stand in several sources: a repetition that no source's own epochs show."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bloomery.data.plan import Plan
from bloomery.errors import ConfigError


class Contents(NamedTuple):
    """The documents of one source: content hashes, (n,) uint64, ascending and distinct, and their tokens, (n,)."""

    hashes: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, hashes: Sequence[int], tokens: Sequence[int]) -> "Contents":
        """From documents in any order."""
        found, first = np.unique(np.array(hashes, dtype=np.uint64), return_index=True)
        return cls(found, np.array(tokens, dtype=np.int64)[first])


def shared_tokens(sources: Mapping[str, Contents]) -> dict[tuple[str, str], int]:
    """(source, later source) → tokens of the documents that both hold, for pairs that share any."""
    names, found = list(sources), {}
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            _, places, _ = np.intersect1d(
                sources[first].hashes, sources[second].hashes, assume_unique=True, return_indices=True
            )
            if len(places):
                found[first, second] = int(sources[first].tokens[places].sum())
    return found


def refuse_hidden_epochs(
    plan: Plan, shared: Mapping[tuple[str, str], int], tokens: Mapping[str, float], caps: Mapping[str, float | None]
) -> None:
    """Raises `ConfigError` where documents of two sources are read more often, in both together, than either's cap.

    A hundredth of the smaller source may be shared: near duplicates of that order are left by any deduplication.
    """
    epochs = dict(zip(plan.sources, plan.epochs.tolist(), strict=True))
    for (first, second), both in shared.items():
        given = [cap for cap in (caps.get(first), caps.get(second)) if cap is not None]
        together = epochs[first] + epochs[second]
        if given and together > min(given) and both > 0.01 * min(tokens[first], tokens[second]):
            raise ConfigError(
                f"sources.{second}: {both:,} of its tokens are in {first} as well and would be read {together:.2f} "
                f"times in both, more than max_epochs {min(given):g}; deduplicate across sources, or lower a weight"
            )
