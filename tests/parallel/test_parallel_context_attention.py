"""Attention over the context axis against one process: values and every gradient, all forms, layouts and masks."""

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import run

from bloomery.model.attention import AttentionCore
from bloomery.model.context import Context
from bloomery.parallel import blocks
from bloomery.parallel.collectives import traffic
from bloomery.parallel.context import ContextAttention
from bloomery.parallel.sequence import ContextAxis, Layout

BATCH, HEADS, HEAD_DIM = 2, 4, 8
FORMS, LAYOUTS = ("allgather", "ring", "heads"), ("zigzag", "contiguous")


def _inputs(seq, key_heads, dtype=torch.float64):
    """Query, key, value and what the loss multiplies the output by."""
    draw = torch.Generator().manual_seed(seq + key_heads)
    heads = (HEADS, key_heads, key_heads, HEADS)
    return [torch.randn(BATCH, h, seq, HEAD_DIM, generator=draw, dtype=torch.float64).to(dtype) for h in heads]


def _documents(seq):
    """Borders inside chunks, at their edges, a document over all of the row's end, and one of a single token."""
    ids = torch.zeros(BATCH, seq, dtype=torch.int64)
    for row, borders in enumerate([(3, seq // 4, seq // 2 + 1), (seq // 2, seq - 1)]):
        for border in borders:
            ids[row, border:] += 1
    return ids


def _mask(name, seq, ranks):
    """(documents, window) of a named case."""
    chunk = seq // (2 * ranks)
    return {
        "causal": (None, None),
        "one document": (torch.full((BATCH, seq), 7), None),
        "documents": (_documents(seq), None),
        "window 5": (None, 5),
        "window C": (None, chunk),
        "window 3C": (None, 3 * chunk),
        "documents, window 5": (_documents(seq), 5),
    }[name]


def _whole(seq, key_heads, segment_ids, window, dtype=torch.float64):
    query, key, value, weight = _inputs(seq, key_heads, dtype)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    context = Context(BATCH, seq, query.device, segment_ids, None, window)
    output = AttentionCore()(*leaves, context)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def _part(form, kind, seq, key_heads, segment_ids, window, dtype=torch.float64):
    """One rank's output and gradients, from its tokens alone."""
    group = dist.group.WORLD
    index = Layout(seq, dist.get_world_size(), kind).index(dist.get_rank())
    query, key, value, weight = (t[:, :, index] for t in _inputs(seq, key_heads, dtype))
    leaves = [t.requires_grad_() for t in (query, key, value)]
    own = None if segment_ids is None else segment_ids[:, index]
    core = ContextAttention(AttentionCore(), ContextAxis(group, kind, window), form)
    output = core(*leaves, Context(BATCH, len(index), query.device, own, None, window))
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def _parts(cases, dtype):
    return [_part(*case, dtype=dtype) for case in cases]


def _compare(ranks, cases, dtype, tolerance):
    by_rank = run(ranks, _parts, cases, dtype)
    for number, (form, kind, seq, key_heads, segment_ids, window) in enumerate(cases):
        layout = Layout(seq, ranks, kind)
        expected = _whole(seq, key_heads, segment_ids, window, dtype)
        found = [layout.in_order(torch.cat(parts, 2), 2) for parts in zip(*(r[number] for r in by_rank), strict=True)]
        for name, one, other in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
            error = (one - other).abs().max() / other.abs().max()
            assert error <= tolerance, (
                f"{name} {form} {kind} seq {seq}, {key_heads} key heads, window {window}: {error}"
            )


MASKS = ("causal", "one document", "documents", "window 5", "window C", "window 3C", "documents, window 5")


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_attend_as_one(form, kind):
    cases = [(form, kind, 32, 2, *_mask(name, 32, 2)) for name in MASKS]
    cases += [(form, kind, 32, key_heads, *_mask("documents", 32, 2)) for key_heads in (1, 4)]
    _compare(2, cases, torch.float64, 1e-12)


def test_four_ranks_attend_as_one():
    cases = [
        (form, kind, 32, key_heads, *_mask(name, 32, 4))
        for form, kind, (key_heads, name) in itertools.product(
            FORMS, LAYOUTS, [(1, "causal"), (2, "documents"), (4, "window 3C")]
        )
    ]
    _compare(4, cases, torch.float64, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_layout_and_mask_attends_as_one(ranks, form):
    if form == "heads" and HEADS % ranks:
        pytest.skip("4 heads on 8 ranks: refused")
    cases = [
        (form, kind, seq, key_heads, *_mask(name, seq, ranks))
        for kind, seq, key_heads, name in itertools.product(LAYOUTS, (32, 64), (1, 2, 4), MASKS)
    ]
    _compare(ranks, cases, torch.float64, 1e-12)


def test_float32_is_as_exact_as_float32_is():
    cases = [(form, "zigzag", 64, 2, *_mask(name, 64, 2)) for form in FORMS for name in ("causal", "documents")]
    _compare(2, cases, torch.float32, 2e-5)


def _counting(kind, ranks_documents):
    """Score entries a rank looks at, forward and backward, masked half of the diagonal left out."""
    seen = []

    def counted(attend):
        def call(*tensors_and_masks, causal, mask):
            q, k = tensors_and_masks[-3:-1] if len(tensors_and_masks) == 3 else tensors_and_masks[1:3]
            seen.append(q.shape[2] * (q.shape[2] + 1) // 2 if causal else q.shape[2] * k.shape[2])
            return attend(*tensors_and_masks, causal, mask)

        return call

    with (
        mock.patch.object(blocks, "attend", counted(blocks.attend)),
        mock.patch.object(blocks, "attend_backward", counted(blocks.attend_backward)),
    ):
        _part("ring", kind, 64, 2, *ranks_documents)
    return sum(seen)


def test_zigzag_gives_every_rank_the_same_work():
    ranks, chunk = 4, 64 // 8
    balanced = run(ranks, _counting, "zigzag", (None, None))
    each = 2 * chunk * (chunk + 1) // 2 + chunk**2 + (ranks - 1) * 2 * chunk**2
    assert balanced == [2 * each] * ranks  # forward and backward
    contiguous = run(ranks, _counting, "contiguous", (None, None))
    assert contiguous == [2 * (16 * 17 // 2 + rank * 16**2) for rank in range(ranks)]


def test_what_nobody_sees_is_not_looked_at():
    aligned = torch.arange(4).repeat_interleave(16).expand(BATCH, 64)  # one document a rank
    assert run(4, _counting, "contiguous", (aligned, None)) == [2 * 16 * 17 // 2] * 4
    assert run(4, _counting, "contiguous", (None, 5)) == [2 * 16**2] + [2 * 2 * 16**2] * 3


def _sent(form, kind, seq, key_heads, segment_ids, window):
    with traffic() as forward:
        index = Layout(seq, dist.get_world_size(), kind).index(dist.get_rank())
        query, key, value, weight = (t[:, :, index].float() for t in _inputs(seq, key_heads))
        own = None if segment_ids is None else segment_ids[:, index]
        core = ContextAttention(AttentionCore(), ContextAxis(dist.group.WORLD, kind, window), form)
        leaves = [t.requires_grad_() for t in (query, key, value)]
        output = core(*leaves, Context(BATCH, len(index), query.device, own, None, window))
    with traffic() as backward:
        (output * weight).sum().backward()
    return [{operation: sent for (_, operation), sent in part.items()} for part in (forward, backward)]


def test_bytes_sent_are_those_of_the_formulas():
    ranks, seq, key_heads = 4, 64, 2
    own = BATCH * seq // ranks * HEAD_DIM * 4  # bytes of one head of a rank's tokens
    keys_and_values = 2 * key_heads * own
    for forward, backward in run(ranks, _sent, "ring", "zigzag", seq, key_heads, None, None):
        assert forward == {"shift": (ranks - 1) * keys_and_values}
        assert backward == {"shift": (ranks - 1) * keys_and_values + ranks * keys_and_values}
    for forward, backward in run(ranks, _sent, "allgather", "zigzag", seq, key_heads, None, None):
        assert forward == {"gather": (ranks - 1) * keys_and_values}
        assert backward == forward | {"reduce_scatter": (ranks - 1) * keys_and_values}
    for forward, backward in run(ranks, _sent, "heads", "zigzag", seq, 4, None, None):
        assert forward == backward == {"all_to_all": (2 * HEADS + 2 * 4) * own * (ranks - 1) // ranks}


def test_a_ring_ends_where_nothing_is_left_to_see():
    own = BATCH * 16 * HEAD_DIM * 4 * 2 * 2
    for forward, backward in run(4, _sent, "ring", "contiguous", 64, 2, None, 5):
        assert (forward, backward) == ({"shift": own}, {"shift": 3 * own})
    aligned = torch.arange(4).repeat_interleave(16).expand(BATCH, 64)
    for forward, backward in run(4, _sent, "ring", "contiguous", 64, 2, aligned, None):
        assert forward == {"gather": 3 * BATCH * 16 * 8}  # the documents, once a pass
        assert backward == {}


def test_plain_products_are_the_fused_kernel():
    """Where a GPU has no kernel for a type, the plain form also serves blocks without documents."""
    query, key, value, weight = _inputs(32, 2)
    for causal in (False, True):
        fused = blocks.attend(query, key, value, causal, None)
        fused_back = blocks.attend_backward(weight, query, key, value, *fused, causal, None)
        with mock.patch.object(blocks, "_fused", return_value=False), mock.patch.object(blocks, "_TILE_SCORES", 900):
            plain = blocks.attend(query, key, value, causal, None)
            plain_back = blocks.attend_backward(weight, query, key, value, *plain, causal, None)
        torch.testing.assert_close((*plain, *plain_back), (*fused, *fused_back), rtol=1e-12, atol=1e-12)
        scores = query @ key.repeat_interleave(2, 1).mT / HEAD_DIM**0.5
        seen = torch.ones(32, 32, dtype=torch.bool).tril() if causal else torch.ones(32, 32, dtype=torch.bool)
        torch.testing.assert_close(plain[1], scores.masked_fill(~seen, -torch.inf).logsumexp(-1))


def test_a_query_that_sees_nothing_is_zero_and_never_nan():
    query, key, value, weight = _inputs(8, 2)

    def unseen(rows):
        return (torch.arange(8)[rows, None] >= 4).expand(1, -1, 8)

    o, total = blocks.attend(query, key, value, False, unseen)
    assert not o[:, :, :4].any()
    assert (total[:, :, :4] == -torch.inf).all()
    merged, merged_total = torch.zeros_like(o), torch.full_like(total, -torch.inf)
    blocks.merge(merged, merged_total, o, total)
    blocks.merge(merged, merged_total, torch.zeros_like(o), torch.full_like(total, -torch.inf))
    torch.testing.assert_close(merged, o)
    gradients = blocks.attend_backward(weight, query, key, value, o, total, False, unseen)
    assert all(t.isfinite().all() for t in gradients)
    assert not gradients[0][:, :, :4].any()


def test_blocks_of_half_precision_are_summed_in_float32():
    query, key, value, _ = (t.bfloat16() for t in _inputs(16, 2))
    for mask in (None, lambda rows: torch.ones(1, rows.stop - rows.start, 16, dtype=torch.bool)):
        o, total = blocks.attend(query, key, value, False, mask)
        assert o.dtype == total.dtype == torch.float32
