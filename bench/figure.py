"""One measured comparison, as every file of this folder reports it."""

import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from bloomery import artifact

PACKAGES = ("torch", "transformers")


def figure(
    name: str, ours: Sequence[float], peer: Sequence[float], unit: str, versions: Mapping[str, str] | None = None
) -> dict[str, object]:
    """Medians of rates taken in turns, the ratio of the medians (above 1: ours is faster), and the lowest and highest
    ratio of a turn. `versions` of the peer's packages; absent: those of this environment."""
    ratios = [mine / theirs for mine, theirs in zip(ours, peer, strict=True)]
    found = versions or {package: version(package) for package in PACKAGES}
    return {
        "name": name,
        "ours": round(statistics.median(ours), 1),
        "peer": round(statistics.median(peer), 1),
        "ratio": round(statistics.median(ours) / statistics.median(peer), 3),
        "unit": unit,
        "spread": f"{min(ratios):.2f}–{max(ratios):.2f}",
        "versions": {**found, "bloomery": artifact.version()},
    }
