"""Collectives with gradients, the same on gloo and NCCL. A group of `None` is a group of one: nothing happens.

Every one is a linear map over the values of all ranks, and its backward the transpose of that map, under the rule that
the loss is the sum of what the ranks hold: a value that several ranks read gets the sum of their gradients.

| forward | backward |
|---|---|
| `gather_tokens` | reduce-scatter: every rank uses the whole, each its own way |
| `scatter_tokens` | gather |
| `split_tokens` | gather: all ranks hold the same whole and keep a part |
| `gather_whole` | own part: all ranks go on with the same whole, which counts once |
| `all_to_all` | all-to-all the other way |
| `shift` | shift the other way |
| `sum_over` | identity: the sum counts once |
| `sum_gradient` | all-reduce: a copy each, used by each its own way |
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Group = ProcessGroup | None
Traffic = Counter[tuple[str, str]]
"""Bytes this rank sent by (group, operation)."""

_counters: list[Traffic] = []
# torch 2.13 renames both and warns at every call of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts what this rank sends while the block runs, backward passes included.

    A group goes by its description (`dist.new_group(group_desc="context")`). Bytes are those of the bandwidth-optimal
    algorithm, n ranks: (n − 1)/n of the whole for gather and reduce-scatter, twice that for all-reduce, exactly what
    leaves the rank for all-to-all and shift. FSDP and pipeline schedules do their own sending and are not counted.
    """
    counter: Traffic = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


def gather_tokens(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """The ranks' parts side by side along `dim`, in rank order; `sizes` of all ranks along it unless they are equal."""
    return _apply(x, group, partial(_gather, dim=dim, sizes=sizes), partial(_scatter, dim=dim, sizes=sizes))


def scatter_tokens(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's part along `dim` of the sum of all ranks' x; `sizes` as in `gather_tokens`."""
    return _apply(x, group, partial(_scatter, dim=dim, sizes=sizes), partial(_gather, dim=dim, sizes=sizes))


def split_tokens(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part along `dim` of an x that all ranks hold; every rank's part then counts."""
    return _apply(x, group, partial(_own, dim=dim), partial(_gather, dim=dim, sizes=None))


def gather_whole(x: Tensor, dim: int, group: Group) -> Tensor:
    """As `gather_tokens`, for a whole of which all ranks then compute the same loss."""
    return _apply(x, group, partial(_gather, dim=dim, sizes=None), partial(_own, dim=dim))


def all_to_all(x: Tensor, in_splits: Sequence[int] | None, out_splits: Sequence[int] | None, group: Group) -> Tensor:
    """Sends in_splits[r] rows of x to rank r, in order, and returns the rows received, out_splits[r] from rank r.

    Splits of zero are fine, also all of them; `None` for equal ones.
    """
    there, back = (_checked(splits, x, group) for splits in (in_splits, out_splits))
    forward = partial(_exchange, in_splits=there, out_splits=back)
    return _apply(x, group, forward, partial(_exchange, in_splits=back, out_splits=there))


def shift(x: Tensor, group: Group, by: int = 1) -> Tensor:
    """What the rank `by` places before sent, around the ring; shapes are the same on all ranks."""
    return _apply(x, group, partial(_shifted, by=by), partial(_shifted, by=-by))


def sum_over(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' x, which then counts once however many ranks hold it."""
    return _apply(x, group, _summed, _same)


def sum_gradient(x: Tensor, group: Group) -> Tensor:
    """x itself; its gradient is the sum of those of all ranks."""
    return _apply(x, group, _same, _summed)


def all_reduce_(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """x (contiguous) summed over the ranks in place, without gradient."""
    if group is not None:
        ranks = dist.get_world_size(group)
        _count(group, "all_reduce", -(-2 * (ranks - 1) * _bytes(x) // ranks))
        dist.all_reduce(x, op=op, group=group)
    return x


def start_shift(tensors: Sequence[Tensor], group: ProcessGroup, by: int = 1) -> Callable[[], list[Tensor]]:
    """`shift` of several tensors under way while others are worked on: call the result to wait for what arrives."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (by, -by))
    sent = [t.contiguous() for t in tensors]
    arriving = [torch.empty_like(t) for t in sent]
    operations = [dist.P2POp(dist.isend, t, after, group, tag) for tag, t in enumerate(sent)]
    operations += [dist.P2POp(dist.irecv, t, before, group, tag) for tag, t in enumerate(arriving)]
    _count(group, "shift", sum(_bytes(t) for t in sent))
    works = dist.batch_isend_irecv(operations)

    def wait() -> list[Tensor]:
        for work in works:
            work.wait()
        sent.clear()  # until here the transfer reads them
        return arriving

    return wait


class _Linear(torch.autograd.Function):
    """A linear map over the ranks and, as backward, its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, there: Callable, back: Callable) -> Tensor:
        ctx.group, ctx.there, ctx.back = group, there, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Linear.apply(grad, ctx.group, ctx.back, ctx.there), None, None, None


def _apply(x: Tensor, group: Group, there: Callable, back: Callable) -> Tensor:
    return x if group is None else _Linear.apply(x, group, there, back)


def _gather(x: Tensor, group: ProcessGroup, dim: int, sizes: Sequence[int] | None) -> Tensor:
    ranks, rows = dist.get_world_size(group), x.movedim(dim, 0).contiguous()
    if sizes is not None and len(set(sizes)) > 1:  # gloo has no gather of unequal parts
        copies = rows.repeat(ranks, *[1] * (rows.dim() - 1))
        return _exchange(copies, group, [len(rows)] * ranks, sizes, "gather").movedim(0, dim)
    whole = rows.new_empty(ranks * len(rows), *rows.shape[1:])
    _count(group, "gather", (ranks - 1) * _bytes(rows))
    _all_gather(whole, rows, group=group)
    return whole.movedim(0, dim)


def _scatter(x: Tensor, group: ProcessGroup, dim: int, sizes: Sequence[int] | None) -> Tensor:
    ranks, rows = dist.get_world_size(group), x.movedim(dim, 0).contiguous()
    if sizes is not None and len(set(sizes)) > 1:
        own = sizes[dist.get_rank(group)]
        parts = _exchange(rows, group, sizes, [own] * ranks, "reduce_scatter").unflatten(0, (ranks, own))
        exact = torch.promote_types(x.dtype, torch.float32)
        return parts.sum(0, dtype=exact).to(x.dtype).movedim(0, dim)
    assert len(rows) % ranks == 0, f"{len(rows)} rows over {ranks} ranks"
    part = rows.new_empty(len(rows) // ranks, *rows.shape[1:])
    _count(group, "reduce_scatter", (ranks - 1) * _bytes(part))
    _reduce_scatter(part, rows, group=group)
    return part.movedim(0, dim)


def _exchange(
    x: Tensor,
    group: ProcessGroup,
    in_splits: Sequence[int] | None,
    out_splits: Sequence[int] | None,
    name: str = "all_to_all",
) -> Tensor:
    rank, ranks, x = dist.get_rank(group), dist.get_world_size(group), x.contiguous()
    received = len(x) if out_splits is None else sum(out_splits)
    kept = len(x) // ranks if in_splits is None else in_splits[rank]
    row = _bytes(x) // len(x) if len(x) else 0
    _count(group, name, (len(x) - kept) * row)
    out = x.new_empty(received, *x.shape[1:])
    dist.all_to_all_single(out, x, _list(out_splits), _list(in_splits), group=group)
    return out


def _shifted(x: Tensor, group: ProcessGroup, by: int) -> Tensor:
    return start_shift([x], group, by)()[0]


def _own(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    ranks = dist.get_world_size(group)
    assert x.shape[dim] % ranks == 0, f"dim {dim} of {tuple(x.shape)} over {ranks} ranks"
    return x.chunk(ranks, dim)[dist.get_rank(group)].contiguous()


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    return all_reduce_(x.clone(memory_format=torch.contiguous_format), group)


def _same(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.view_as(x)


def _checked(splits: Sequence[int] | None, x: Tensor, group: Group) -> Sequence[int] | None:
    assert splits is None or group is None or len(splits) == dist.get_world_size(group), f"{splits}: one for each rank"
    return splits


def _list(splits: Sequence[int] | None) -> list[int] | None:
    return None if splits is None else list(splits)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _count(group: ProcessGroup, operation: str, sent: int) -> None:
    name = group.group_desc
    for counter in _counters:
        counter[name, operation] += sent
