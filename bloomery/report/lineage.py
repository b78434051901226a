"""The life as a picture: one row per stage, a lane per family of product, a line from each input to its reader.

A line runs down its source's lane where that is free, else down its target's, else down a track of its own beside the
lanes: two lines lie on each other only where they start from the same stage.
"""

from dataclasses import dataclass, field

from bloomery.report.run import Family, Run

ROW, LANE, TRACK, MARGIN = 76, 21, 8, 12
"""Pixels: height of a row (the page's rows have the same), distance of lanes and of tracks, space at the sides."""
LANES: tuple[Family, ...] = ("model", "data", "tokenizer", "evaluation", "other")


@dataclass(frozen=True)
class Node:
    """One stage's mark."""

    name: str
    family: Family
    x: int
    y: int
    finished: bool


@dataclass(frozen=True)
class Edge:
    """One input: an SVG path from the stage that made it to the stage that read it."""

    source: str
    target: str
    family: Family
    path: str


@dataclass(frozen=True)
class Lineage:
    """Geometry in pixels, for an inline SVG beside the rows."""

    width: int
    height: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


@dataclass
class _Columns:
    """Which stretches of which x are taken, and by the lines of which source."""

    first_track: int
    taken: dict[int, list[tuple[int, int, str]]] = field(default_factory=dict)

    def free(self, x: int, top: int, bottom: int, source: str) -> bool:
        """Nothing but `source`'s own lines and ends between `top` and `bottom` (exclusive)."""
        return all(owner == source or end <= top or start >= bottom for start, end, owner in self.taken.get(x, []))

    def choose(self, source: Node, target: Node) -> int:
        """The x down which a line from `source` to `target` runs; taken from then on."""
        tracks = range(self.first_track, self.first_track + 100 * TRACK, TRACK)
        top, bottom = source.y, target.y
        x = next(x for x in (source.x, target.x, *tracks) if self.free(x, top, bottom, source.name))
        self.taken.setdefault(x, []).append((top, bottom, source.name))
        return x

    @property
    def right(self) -> int:
        return max(self.taken, default=0)


def lineage(run: Run) -> Lineage:
    """Place the stages of `run` from top to bottom, in the order in which they finished."""
    families = [family for family in LANES if any(stage.family == family for stage in run.stages)]
    nodes = {
        stage.name: Node(
            stage.name, stage.family, MARGIN + LANE * families.index(stage.family), ROW * row + ROW // 2,
            stage.manifest is not None,
        )
        for row, stage in enumerate(run.stages)
    }  # fmt: skip
    columns = _Columns(MARGIN + LANE * (len(families) - 1) + 2 * TRACK)
    for node in nodes.values():
        columns.taken.setdefault(node.x, []).append((node.y, node.y, node.name))
    pairs = [(nodes[source], nodes[stage.name]) for stage in run.stages for source in stage.sources]
    pairs.sort(key=lambda pair: (pair[0].x != pair[1].x, abs(pair[1].y - pair[0].y)))
    edges = tuple(Edge(a.name, b.name, a.family, _path(a, b, columns.choose(a, b))) for a, b in pairs)
    return Lineage(columns.right + MARGIN, ROW * len(run.stages), tuple(nodes.values()), edges)


def _path(source: Node, target: Node, x: int) -> str:
    """From `source` over to `x` within half a row, down, and over to `target` within half a row."""
    half = ROW // 2
    out = _bend(source.x, x, source.y, source.y + half)
    into = _bend(x, target.x, target.y - half, target.y)
    return f"M{source.x} {source.y}{out}V{target.y - half}{into}"


def _bend(start: int, end: int, top: int, bottom: int) -> str:
    if start == end:
        return f"V{bottom}"
    middle = (top + bottom) // 2
    return f"C{start} {middle},{end} {middle},{end} {bottom}"
