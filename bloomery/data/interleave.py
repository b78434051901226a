"""Which source is drawn when: an even order with exact counts, computed for any place without the places before it.

Sources are the leaves of a binary tree. Of the c sequences that a node is given first, its lighter child gets
round(p · c), where p is the child's share; so every draw finds its way from the root to a source by itself, and how
often each source was drawn before is known on the way.
"""

import heapq
from collections.abc import Sequence

import numpy as np

_CHUNK = 16_384  # draws handled at once: their arrays stay in the processor's cache


class Interleave:
    """The order of one phase: source i is drawn counts[i] times, and at any place as often as its share to within
    about one sequence."""

    def __init__(self, counts: Sequence[int]):
        self.num_sources, self.total = len(counts), int(sum(counts))
        size = 2 * self.num_sources
        self._light, self._heavy = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        self._share = np.zeros(size)  # of the lighter child, so at most ½: its count grows by at most one a draw
        self._root = self._grow(counts)

    def _grow(self, counts: Sequence[int]) -> int:
        """Joins the two lightest nodes until one is left (Huffman): a child is seldom much lighter than its sibling's
        children, which keeps the sum of what rounding costs on the way small. Leaves come first in the arrays."""
        waiting = [(int(count), source) for source, count in enumerate(counts) if count]
        heapq.heapify(waiting)
        node = self.num_sources
        while len(waiting) > 1:
            light, heavy = heapq.heappop(waiting), heapq.heappop(waiting)
            total = light[0] + heavy[0]
            self._light[node], self._heavy[node], self._share[node] = light[1], heavy[1], light[0] / total
            heapq.heappush(waiting, (total, node))
            node += 1
        return waiting[0][1] if waiting else 0

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source, and how often it was drawn before, of the places [start, stop): two (n,) int64 arrays."""
        source, number = np.empty(stop - start, dtype=np.int64), np.empty(stop - start, dtype=np.int64)
        for begin in range(start, stop, _CHUNK):
            part = slice(begin - start, min(stop, begin + _CHUNK) - start)
            self._descend(np.arange(begin, begin + part.stop - part.start), source[part], number[part])
        return source, number

    def _descend(self, place: np.ndarray, source: np.ndarray, number: np.ndarray) -> None:
        """Takes each place of the root down to a place within its source."""
        node, before, waiting = np.full(len(place), self._root), place.astype(np.float64), np.arange(len(place))
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
