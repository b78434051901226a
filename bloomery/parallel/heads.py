"""From every head of some tokens to some heads of every token and back (DeepSpeed-Ulysses, arXiv 2309.14509)."""

from torch import Tensor

from bloomery.parallel.collectives import all_to_all
from bloomery.parallel.sequence import ContextAxis, Layout


def to_heads(x: Tensor, axis: ContextAxis, layout: Layout) -> Tensor:
    """(batch, seq / ranks, heads, …) → (batch, seq, heads / ranks, …) in the order of the sequence."""
    by_rank = x.unflatten(2, (axis.ranks, -1)).movedim(2, 0)
    received = all_to_all(by_rank, None, None, axis.group)
    return layout.in_order(received.movedim(0, 1).flatten(1, 2), 1)


def to_tokens(x: Tensor, axis: ContextAxis, layout: Layout) -> Tensor:
    """The way back: (batch, seq, heads / ranks, …) → (batch, seq / ranks, heads, …)."""
    by_rank = layout.by_rank(x, 1).unflatten(1, (axis.ranks, -1)).movedim(1, 0)
    received = all_to_all(by_rank, None, None, axis.group)
    return received.movedim(0, 2).flatten(2, 3)


def enough(x: Tensor, axis: ContextAxis) -> Tensor:
    """(…, heads, channels) that several heads share, repeated until every rank gets one; gradients add up again."""
    missing = axis.ranks // x.shape[-2] if x.shape[-2] % axis.ranks else 1
    return x.repeat_interleave(missing, -2)


def refusal(heads: int, shared: int, ranks: int) -> str | None:
    """Why `heads`, of which several share one of `shared`, cannot be spread over ranks, and what could; or `None`."""
    if heads % ranks:
        return f"{heads} heads over {ranks} context ranks: expected a multiple of the ranks"
    if shared % ranks and ranks % shared:
        return f"{shared} key or state groups over {ranks} context ranks: expected a multiple or a divisor of the ranks"
    return None
