"""One measured comparison, as every file of this folder reports it."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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


def take_turns(
    name: str, ours: Callable[[], object], peer: Callable[[], object], work: float, unit: str, repeats: int
) -> dict[str, object]:
    """The figure of two sides in this process, run in turns after a warm-up each. `work` is what one run does, in the
    numerator of `unit`; time is the process's own, so that what else the machine does hardly enters."""
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(repeats + 1):
        for side, run in (("ours", ours), ("peer", peer)):
            start = time.process_time()
            run()
            if repeat:  # the first is warm-up
                rates[side].append(work / (time.process_time() - start))
    return figure(name, rates["ours"], rates["peer"], unit)
