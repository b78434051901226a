"""Which source is drawn when: an even order with exact counts, computed for any place without the places before it.

Sources are the leaves of a binary tree. Of the c sequences that a node is given first, its lighter child gets
round(p · c), where p is the child's share; so every draw finds its way from the root to a source by itself, and how
often each source was drawn before is known on the way.
"""

from collections.abc import Sequence

import numpy as np

from bloomery.data.interleave_tree import balanced_tree

_WINDOW = 2**19  # draws swept through the tree at once: enough to pay for visiting its nodes, few enough for memory
_MANY = 8  # draws per source from which it is cheaper to visit each node once than to take each draw down by itself


class Interleave:
    """The order of one phase: source i is drawn counts[i] times, and at any place as often as its share to within
    about one sequence; `balanced_tree` has the bound."""

    def __init__(self, counts: Sequence[int]):
        self.num_sources, self.total = len(counts), int(sum(counts))
        children, weights, self._root = balanced_tree(counts)
        size = 2 * self.num_sources
        self._light, self._heavy = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        self._share = np.zeros(size)  # of the lighter child, so at most ½: its count grows by at most one a draw
        for node, both in children.items():
            light, heavy = sorted(both, key=lambda child: (weights[child], child))
            self._light[node], self._heavy[node], self._share[node] = light, heavy, weights[light] / weights[node]

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source, and how often it was drawn before, of the places [start, stop): two (n,) int64 arrays."""
        source, number = np.empty(stop - start, dtype=np.int64), np.empty(stop - start, dtype=np.int64)
        one_way = self._sweep if stop - start > _MANY * self.num_sources else self._descend
        for begin in range(start, stop, _WINDOW):
            part = slice(begin - start, min(stop, begin + _WINDOW) - start)
            one_way(begin, source[part], number[part])
        return source, number

    def _descend(self, start: int, source: np.ndarray, number: np.ndarray) -> None:
        """Takes each place from `start` on down to a source, all places level by level."""
        before = np.arange(start, start + len(source), dtype=np.float64)
        node, waiting = np.full(len(source), self._root), np.arange(len(source))
        while len(waiting):
            arrived = node < self.num_sources
            if arrived.any():
                source[waiting[arrived]], number[waiting[arrived]] = node[arrived], before[arrived]
                node, before, waiting = node[~arrived], before[~arrived], waiting[~arrived]
            share = self._share[node]
            light = np.floor(share * before + 0.5)
            goes_light = np.floor(share * (before + 1) + 0.5) > light
            before = np.where(goes_light, light, before - light)
            node = np.where(goes_light, self._light[node], self._heavy[node])

    def _sweep(self, start: int, source: np.ndarray, number: np.ndarray) -> None:
        """The same node by node: the places that reach a node follow one another there."""
        steps, work = np.arange(len(source) + 1, dtype=np.float64), np.empty(len(source) + 1)
        waiting = [(self._root, start, np.arange(len(source)))]
        while waiting:
            node, first, places = waiting.pop()
            if node < self.num_sources:
                source[places], number[places] = node, np.arange(first, first + len(places))
                continue
            light = np.add(steps[: len(places) + 1], first, out=work[: len(places) + 1])
            light *= self._share[node]
            light += 0.5
            np.floor(light, out=light)
            begun, goes_light = int(light[0]), light[1:] > light[:-1]
            own, others = places.take(np.flatnonzero(goes_light)), places.take(np.flatnonzero(~goes_light))
            waiting += [(int(self._light[node]), begun, own)] * (len(own) > 0)
            waiting += [(int(self._heavy[node]), first - begun, others)] * (len(others) > 0)

    def counts_at(self, place: int) -> np.ndarray:
        """(sources,) how often each source is drawn before `place`."""
        found, waiting = np.zeros(self.num_sources, dtype=np.int64), [(self._root, place)]
        while waiting:
            node, count = waiting.pop()
            if node < self.num_sources:
                found[node] = count
            else:
                light = int(np.floor(self._share[node] * count + 0.5))
                waiting += [(int(self._light[node]), light), (int(self._heavy[node]), count - light)]
        return found
