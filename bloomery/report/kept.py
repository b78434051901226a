"""What a stage kept and dropped of each source, as one bar a source and a table of the reasons."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bloomery.report import quantities
from bloomery.report.facts import Grid
from bloomery.report.run import Stage

_COLOURED = 5
_COLUMNS = 12
OTHER = "other reasons"


@dataclass(frozen=True)
class Segment:
    """Part of a bar. `color` is 0 for what was kept, 1 to 5 for the commonest reasons, 6 for all others together."""

    label: str
    count: int
    share: float
    color: int


@dataclass(frozen=True)
class Bar:
    """One source: what was read of it, from left to right kept and dropped."""

    source: str
    read: int
    kept: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Kept:
    """The bars of a stage, what their colours mean, and the counts behind them."""

    bars: tuple[Bar, ...]
    legend: tuple[tuple[str, int], ...]
    reasons: Grid | None


def kept(stage: Stage) -> Kept | None:
    """None where the stage has no account of `kept` and `dropped` by source."""
    sources = stage.summary.get("sources")
    if not isinstance(sources, Mapping) or not sources or not all(map(_is_account, sources.values())):
        return None
    totals: Counter[str] = Counter()
    for source in sources.values():
        totals.update(source["dropped"])
    ranked = [reason for reason, _ in totals.most_common()]
    colors = {reason: min(place, _COLOURED + 1) for place, reason in enumerate(ranked, 1)}
    bars = tuple(_bar(name, source, colors) for name, source in sources.items())
    named = [(reason, color) for reason, color in colors.items() if color <= _COLOURED]
    legend = (("kept", 0), *named, *([(OTHER, _COLOURED + 1)] if len(ranked) > _COLOURED else []))
    return Kept(bars, legend, _reasons(sources, ranked))


def _is_account(source: Any) -> bool:
    return (
        isinstance(source, Mapping)
        and isinstance(source.get("kept"), int)
        and isinstance(source.get("dropped"), Mapping)
    )


def _bar(name: str, source: Mapping[str, Any], colors: Mapping[str, int]) -> Bar:
    read = source["kept"] + sum(source["dropped"].values())
    counts: Counter[tuple[str, int]] = Counter({("kept", 0): source["kept"]})
    for reason, count in source["dropped"].items():
        color = colors[reason]
        counts[reason if color <= _COLOURED else OTHER, color] += count
    ordered = sorted(counts.items(), key=lambda item: item[0][1])
    return Bar(
        name, read, source["kept"], tuple(Segment(*key[:1], n, n / max(1, read), key[1]) for key, n in ordered if n)
    )


def _reasons(sources: Mapping[str, Mapping[str, Any]], ranked: list[str]) -> Grid | None:
    shown, rest = ranked[:_COLUMNS], ranked[_COLUMNS:]
    if not shown:
        return None
    columns = (*shown, *([f"{len(rest)} {OTHER}"] if rest else []))
    rows = []
    for name, source in sources.items():
        counts = [source["dropped"].get(reason, 0) for reason in shown]
        counts += [sum(source["dropped"].get(reason, 0) for reason in rest)] if rest else []
        rows.append((name, *(quantities.grouped(count) if count else "–" for count in counts)))
    return Grid(columns, tuple(rows))
