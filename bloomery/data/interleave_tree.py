"""The tree behind an even order: which sources are told apart first, so that rounding costs none of them much."""

import heapq
from collections.abc import Iterator, Sequence

Children = dict[int, tuple[int, int]]
_SMALL = 32  # sources up to which every part beside the way is tried in every place, not only the next ones above it
_ROUNDS = 6


def balanced_tree(counts: Sequence[int]) -> tuple[Children, list[int], int]:
    """Children of each inner node, weights of all nodes, root. Leaves are the indices of the counts above 0.

    At any place, a source's draws differ from its share by at most its `cost`: half the sum, over itself and the nodes
    above it but the root, of its count by theirs. Huffman's tree is a good start; a source beside a much lighter one
    costs most there, so the lighter one is moved to where it costs less, as long as that helps the worst source.
    """
    children, root = _huffman(counts)
    weights = _weights(counts, children, root)
    worst, source = _worst(children, weights, root)
    for _ in range(_ROUNDS):
        if worst <= 1:
            break
        tried = []
        for part, place in _moves(children, weights, root, source):
            moved, top = _moved(children, root, part, place)
            heavier = _weights(counts, moved, top)
            tried.append((*_worst(moved, heavier, top), moved, heavier, top))
        best = min(tried, key=lambda found: found[0], default=(worst, source, children, weights, root))
        if best[0] >= worst - 1e-12:
            break
        worst, source, children, weights, root = best
    return children, weights, root


def _huffman(counts: Sequence[int]) -> tuple[Children, int]:
    waiting = [(int(count), source) for source, count in enumerate(counts) if count]
    heapq.heapify(waiting)
    children: Children = {}
    for node in range(len(counts), len(counts) + len(waiting) - 1):
        light, heavy = heapq.heappop(waiting), heapq.heappop(waiting)
        children[node] = light[1], heavy[1]
        heapq.heappush(waiting, (light[0] + heavy[0], node))
    return children, waiting[0][1] if waiting else 0


def _weights(counts: Sequence[int], children: Children, root: int) -> list[int]:
    weights = [*map(int, counts)] + [0] * len(counts)
    for node in reversed([*_below(children, root)]):
        if node in children:
            weights[node] = sum(weights[child] for child in children[node])
    return weights


def _below(children: Children, node: int) -> Iterator[int]:
    """The node and all below it, parents first."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += children.get(node, ())


def _worst(children: Children, weights: list[int], root: int) -> tuple[float, int]:
    """The largest cost of a source, and that source."""
    worst, waiting = (0.0, root), [(root, 0.0)]
    while waiting:
        node, above = waiting.pop()
        if node in children:
            waiting += [(child, above + 1 / weights[child]) for child in children[node]]
        else:
            worst = max(worst, (weights[node] * above / 2, node))
    return worst


def _moves(children: Children, weights: list[int], root: int, source: int) -> Iterator[tuple[int, int]]:
    """(part of the tree, node to put it beside) that may help a source: what stands beside its way to the root."""
    parents = {child: node for node, both in children.items() for child in both}
    way = [source]
    while way[-1] in parents:
        way.append(parents[way[-1]])
    for number, node in enumerate(way[:-1]):
        light, heavy = children[way[number + 1]]
        part = heavy if light == node else light
        if len(weights) <= 2 * _SMALL:
            inside = {part, way[number + 1], node, *_below(children, part)}
            yield from ((part, place) for place in _below(children, root) if place not in inside)
        elif weights[part] < weights[node] and number < 3:
            yield from ((part, place) for place in way[number + 2 :])


def _moved(children: Children, root: int, part: int, place: int) -> tuple[Children, int]:
    """The tree with a part taken out and put beside the node at `place`."""
    parents = {child: node for node, both in children.items() for child in both}
    joint = parents[part]
    [rest] = [child for child in children[joint] if child != part]
    found = dict(children)

    def replace(old: int, new: int) -> int:
        if old not in parents:
            return new
        found[parents[old]] = tuple(new if child == old else child for child in found[parents[old]])  # type: ignore[assignment]
        return root

    root = replace(joint, rest)
    parents[rest] = parents.get(joint, -1)
    if rest == root:
        del parents[rest]
    root = replace(place, joint)
    found[joint] = (part, place)
    return found, root
