"""What `prepare` kept and dropped, as a table for a terminal."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

_REASONS_SHOWN = 12
_SOURCES_ABREAST = 6


def drops_table(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """What was read, kept and dropped for each reason, the commonest first, with a column for each source.

    sources: name → `kept` and `dropped` (reason → count), as in the stage's manifest.
    """
    names = list(sources)
    blocks = [names[start : start + _SOURCES_ABREAST] for start in range(0, len(names), _SOURCES_ABREAST)]
    return "\n\n".join(_block({name: sources[name] for name in block}) for block in blocks)


def _block(sources: Mapping[str, Mapping[str, Any]]) -> str:
    totals: Counter[str] = Counter()
    for source in sources.values():
        totals.update(source["dropped"])
    shown = [reason for reason, _ in totals.most_common(_REASONS_SHOWN)]
    rest = [reason for reason in totals if reason not in shown]
    rows = {
        "read": [source["kept"] + sum(source["dropped"].values()) for source in sources.values()],
        "kept": [source["kept"] for source in sources.values()],
    }
    rows |= {f"  {reason}": [source["dropped"].get(reason, 0) for source in sources.values()] for reason in shown}
    if rest:
        others = [sum(source["dropped"].get(reason, 0) for reason in rest) for source in sources.values()]
        rows[f"  {len(rest)} other reasons"] = others
    cells = [[name, *(f"{count:,}" if count else "–" for count in counts)] for name, counts in rows.items()]
    return _aligned(["", *sources], cells)


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = (
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)
