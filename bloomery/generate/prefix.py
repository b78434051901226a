"""What prompts and conversations have left behind, for those that begin alike: keys, values and Mamba-2 memory.

A tree of blocks: a node holds the keys and values of its tokens only, so what several prompts begin with is stored
once. Attention can go on from the end of any node; a recurrent memory cannot be cut back, so a model with Mamba-2
layers goes on only from nodes that also hold a copy of that memory. These copies are large, so they are taken where
they can pay: at the end of a prompt, at the end of an answer in a conversation, and where two prompts part (the rule of
Marconi, arXiv 2411.19379).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bloomery.generate.request import Prompt
from bloomery.model.state import DecodeState

BLOCK = 64  # tokens


@dataclass(eq=False)
class Node:
    """`tokens` behind those of the parent, BLOCK of them or, at the end of a text, fewer."""

    parent: "Node | None"
    tokens: Prompt
    stop: int  # tokens up to here, the parents' included
    span: list[Tensor]  # keys and values of `tokens`
    memory: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None  # (vocab,), of what follows
    ends_text: bool = False
    children: dict[Prompt, "Node"] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return _nbytes(self.span) + _nbytes(self.memory) + (0 if self.logits is None else self.logits.nbytes)

    def path(self) -> Iterator["Node"]:
        """This node, its parent, and so on, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


@dataclass(frozen=True)
class Prefix:
    """What is remembered of a prompt: its first `held` tokens. `known` of them, at least, have been seen before."""

    node: Node
    known: int = 0

    @property
    def held(self) -> int:
        """Tokens that need not be read."""
        return self.node.stop

    @torch.no_grad()
    def restore(self, state: DecodeState, row: int) -> None:
        """Put it into an empty row of `state`."""
        if self.held:
            for node in self.node.path():
                _copy(node.span, state.span(row, node.stop - len(node.tokens), node.stop))
            _copy(self.node.memory, state.memory(row))
            state.lengths[row] = self.held


class PrefixCache:
    """At most `limit` bytes; what was used longest ago goes first. `recurrent`: the model has Mamba-2 layers.

    `fixed`: go on only from whole blocks, or from the end of the very same prompt, so that a prompt is always read in
    the same pieces. `weights` tells which weights the model has, by a value that changes with them.
    """

    def __init__(self, limit: int, recurrent: bool, fixed: bool, weights: Callable[[], object]):
        self.limit, self.recurrent, self._fixed, self._weights = limit, recurrent, fixed, weights
        self.clear()

    def __len__(self) -> int:
        return len(self._recent)

    def clear(self) -> None:
        """Forget everything."""
        self._root = Node(None, (), 0, [])
        self._recent: OrderedDict[Node, None] = OrderedDict()  # a node always after all of its children
        self.nbytes = 0

    def drop_if_stale(self) -> None:
        """Forget everything if the weights have changed since it was computed."""
        if len(self) and self._computed_with != self._weights():
            self.clear()

    def find(self, prompt: Prompt) -> Prefix:
        """The longest beginning of `prompt` to go on from; the whole of it only if its logits are known."""
        nodes = [self._root]
        while (child := nodes[-1].children.get(prompt[nodes[-1].stop : nodes[-1].stop + BLOCK])) and _whole(child):
            nodes.append(child)
        known = nodes[-1].stop
        for node in reversed(nodes):
            candidates = [*self._ends(node, prompt), node]
            found = next((one for one in candidates if self._usable(one, len(prompt))), None)
            if found:
                self._touch(found)
                return Prefix(found, known)
        return Prefix(self._root, known)

    @torch.no_grad()
    def insert(
        self, tokens: Prompt, state: DecodeState, row: int, logits: Tensor | None = None, ends_text: bool = False
    ) -> None:
        """Remember that row `row` of `state` holds exactly `tokens`, and the logits (vocab,) of what follows them.

        What is larger than the whole cache is not taken.
        """
        memory = state.memory(row)
        new = [memory, state.span(row, 0, len(tokens)), [] if logits is None else [logits]]
        if sum(map(_nbytes, new)) > self.limit:
            return
        if not len(self):
            self._computed_with = self._weights()
        node = self._root
        while node.stop < len(tokens):
            node = self._child(node, tokens[node.stop : node.stop + BLOCK], state, row)
        self.nbytes -= node.nbytes
        node.memory = node.memory or _copies(memory)
        node.logits = logits.clone() if logits is not None else node.logits
        node.ends_text |= ends_text
        self.nbytes += node.nbytes
        self._touch(node)
        self._evict()

    def _child(self, parent: Node, tokens: Prompt, state: DecodeState, row: int) -> Node:
        node = parent.children.get(tokens)
        if node is None:
            stop = parent.stop + len(tokens)
            node = Node(parent, tokens, stop, _copies(state.span(row, parent.stop, stop)))
            parent.children[tokens] = node
            self._recent[node] = None
            self.nbytes += node.nbytes
        return node

    def _ends(self, node: Node, prompt: Prompt) -> list[Node]:
        """Ends of texts behind `node` that `prompt` goes on from, the longest first."""
        ends = [
            child
            for tokens, child in node.children.items()
            if not _whole(child) and prompt[node.stop : child.stop] == tokens
        ]
        if self._fixed:
            ends = [end for end in ends if end.stop == len(prompt)]
        return sorted(ends, key=lambda end: -end.stop)

    def _usable(self, node: Node, length: int) -> bool:
        if node.stop >= length and (node.stop > length or node.logits is None):
            return False
        return node.parent is not None and (bool(node.memory) or not self.recurrent)

    def _touch(self, node: Node) -> None:
        for one in node.path():
            self._recent.move_to_end(one)

    def _evict(self) -> None:
        while self.nbytes > self.limit:
            node, _ = self._recent.popitem(last=False)
            assert node.parent is not None
            assert not node.children
            del node.parent.children[node.tokens]
            self.nbytes -= node.nbytes


def next_boundary(held: int) -> int:
    """The first end of a whole block after `held` tokens."""
    return (held // BLOCK + 1) * BLOCK


def parting(one: Prompt, other: Prompt, boundary: int) -> int:
    """The end of the last whole block that two prompts share, given that they share all up to `boundary`."""
    following = boundary + BLOCK
    while min(len(one), len(other)) > following and one[boundary:following] == other[boundary:following]:
        boundary, following = following, following + BLOCK
    return boundary


def _whole(node: Node) -> bool:
    return len(node.tokens) == BLOCK


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _copies(views: Sequence[Tensor]) -> list[Tensor]:
    return [view.clone(memory_format=torch.contiguous_format) for view in views]


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
