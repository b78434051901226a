"""Mamba-2 over the context axis against one process: convolution, scan and their gradients, both forms and layouts."""

import itertools

import pytest
import torch
import torch.distributed as dist
from distributed import run
from exact_training import in_float64

from bloomery.model.conv import causal_conv
from bloomery.model.scan import ChunkedScan
from bloomery.parallel.collectives import traffic
from bloomery.parallel.context_mamba import ContextConvolution, HeadScan, StateScan
from bloomery.parallel.sequence import ContextAxis, Layout

BATCH, HEADS, HEAD_DIM, GROUPS, STATE, TAPS = 2, 8, 4, 2, 8, 4
CHANNELS = HEADS * HEAD_DIM + 2 * GROUPS * STATE
FORMS, LAYOUTS = {"state": StateScan, "heads": HeadScan}, ("zigzag", "contiguous")
DECAYS = {  # ranges of dt and −A
    "mild": (0.01, 0.1, 1, 10),
    "forgotten at once": (0.5, 6, 1, 10),
    "never forgotten": (0.01, 0.1, 1e-9, 1e-6),
    "hardly written": (1e-7, 1e-5, 1, 10),
    "of all sizes": (1e-5, 3, 1e-3, 10),
}
DOCUMENTS = ("none", "many", "one each")


def _inputs(seq, decay):
    """Columns of the convolution, its weight and bias, dt, A, D, and what the loss multiplies y and the state by."""
    draw = torch.Generator().manual_seed(seq)
    shortest, longest, slowest, fastest = DECAYS[decay]
    dt = torch.empty(BATCH, seq, HEADS, dtype=torch.float64).uniform_(shortest, longest, generator=draw)
    shapes = (BATCH, seq, CHANNELS), (CHANNELS, TAPS), (CHANNELS,), (HEADS,), (BATCH, seq, HEADS, HEAD_DIM)
    columns, weight, bias, D, of_y = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    of_state = torch.randn(BATCH, HEADS, HEAD_DIM, STATE, generator=draw, dtype=torch.float64)
    A = -torch.empty(HEADS, dtype=torch.float64).uniform_(slowest, fastest, generator=draw)
    return [columns, dt, weight, bias, A, D], of_y, of_state


def _documents(name, seq):
    if name == "none":
        return None
    ids = torch.zeros(BATCH, seq, dtype=torch.int64)
    rows = [(3, seq // 4, seq // 2 + 1), (1, 2, seq // 2 - 1, seq - 1)] if name == "many" else [(), ()]
    for row, borders in enumerate(rows):
        for border in borders:
            ids[row, border:] += 1
    return ids


def _mixed(columns, dt, weight, bias, A, D, segment_ids, convolve, scan):
    mixed = convolve(columns, weight, bias, None, segment_ids)
    x, B, C = mixed.split([HEADS * HEAD_DIM, GROUPS * STATE, GROUPS * STATE], -1)
    x, B, C = x.unflatten(-1, (HEADS, -1)), B.unflatten(-1, (GROUPS, -1)), C.unflatten(-1, (GROUPS, -1))
    return scan(x, dt, A, B, C, D, segment_ids)


def _whole(seq, decay, segment_ids):
    leaves, of_y, of_state = _inputs(seq, decay)
    leaves = [t.requires_grad_() for t in leaves]
    with in_float64():
        y, state = _mixed(*leaves, segment_ids, causal_conv, ChunkedScan(16))
        loss = (y * of_y).sum() + (state * of_state).sum()
        return [y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def _part(form, kind, seq, decay, segment_ids):
    """One rank's y, state and gradients, from its tokens alone; the loss counts each state once."""
    axis = ContextAxis(dist.group.WORLD, kind)
    index = Layout(seq, axis.ranks, kind).index(axis.rank)
    (columns, dt, *weights), of_y, of_state = _inputs(seq, decay)
    leaves = [t.requires_grad_() for t in (columns[:, index], dt[:, index], *weights)]
    own = None if segment_ids is None else segment_ids[:, index]
    with in_float64():
        scan = FORMS[form](ChunkedScan(16), axis)
        y, state = _mixed(*leaves, own, ContextConvolution(causal_conv, axis), scan)
        if form == "heads":
            of_state = of_state.chunk(axis.ranks, 1)[axis.rank]
        counted = (state * of_state).sum() * (form == "heads" or axis.rank == 0)
        return [y.detach(), state.detach(), *torch.autograd.grad((y * of_y[:, index]).sum() + counted, leaves)]


def _parts(cases):
    return [_part(*case) for case in cases]


def _compare(ranks, cases, tolerance=1e-11):
    by_rank = run(ranks, _parts, cases)
    for number, (form, kind, seq, decay, segment_ids) in enumerate(cases):
        layout = Layout(seq, ranks, kind)
        expected = _whole(seq, decay, segment_ids)
        parts = list(zip(*(rank[number] for rank in by_rank), strict=True))
        tokens = [layout.in_order(torch.cat(parts[place], 1), 1) for place in (0, 2, 3)]
        state = torch.cat(parts[1], 1) if form == "heads" else parts[1][0]
        found = [tokens[0], state, *tokens[1:], *(torch.stack(parts[place]).sum(0) for place in range(4, 8))]
        names = ("y", "state", "dx", "d dt", "d weight", "d bias", "dA", "dD")
        for name, one, other in zip(names, found, expected, strict=True):
            error = (one - other).abs().max() / other.abs().max()
            assert error <= tolerance, f"{name} of {form} {kind} seq {seq}, {decay}: {error}"


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_mix_as_one(form):
    cases = [(form, kind, 32, "mild", _documents(name, 32)) for kind in LAYOUTS for name in DOCUMENTS]
    cases += [(form, "zigzag", 32, decay, _documents("many", 32)) for decay in DECAYS]
    cases += [(form, "zigzag", 32, decay, None) for decay in DECAYS]
    _compare(2, cases)


def test_four_ranks_share_two_groups_and_mix_as_one():
    documents = [_documents(name, 32) for name in ("none", "many")]
    _compare(
        4, [(*case, "of all sizes", ids) for case in itertools.product(FORMS, LAYOUTS, (32,)) for ids in documents]
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_layout_and_document_mixes_as_one(ranks, form):
    every = itertools.product(LAYOUTS, (64, 128), DECAYS, DOCUMENTS)
    _compare(ranks, [(form, kind, seq, decay, _documents(name, seq)) for kind, seq, decay, name in every])


def _sent(form, kind, seq):
    axis = ContextAxis(dist.group.WORLD, kind)
    index = Layout(seq, axis.ranks, kind).index(axis.rank)
    columns, dt, *weights = (t.float() for t in _inputs(seq, "mild")[0])
    leaves = [t.requires_grad_() for t in (columns[:, index], dt[:, index], *weights)]
    with traffic() as forward:
        convolve = ContextConvolution(causal_conv, axis)
        y, _ = _mixed(*leaves, None, convolve, FORMS[form](ChunkedScan(16), axis))
    with traffic() as backward:
        y.sum().backward()
    return [{operation: sent for (_, operation), sent in part.items()} for part in (forward, backward)]


@pytest.mark.parametrize("seq", [32, 64])
def test_bytes_sent_are_those_of_the_formulas(seq):
    ranks = 2
    tail = BATCH * (TAPS - 1) * CHANNELS * 4
    states = (ranks - 1) * 2 * BATCH * HEADS * (HEAD_DIM * STATE + 1) * 4
    of_tokens = (ranks - 1) * BATCH * seq // ranks // ranks * 4
    there = of_tokens * (HEADS * HEAD_DIM + 2 * GROUPS * STATE + HEADS)
    for forward, backward in run(ranks, _sent, "state", "zigzag", seq):
        assert forward == {"all_to_all": tail, "gather": states}
        assert backward == {"all_to_all": tail, "reduce_scatter": states}
    for forward, backward in run(ranks, _sent, "heads", "zigzag", seq):
        assert forward == backward == {"all_to_all": tail + there + of_tokens * HEADS * HEAD_DIM}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_chunks_may_be_shorter_than_the_convolution(kind):
    _compare(4, [("state", kind, seq, "mild", _documents(name, seq)) for seq in (8, 16) for name in ("none", "many")])
