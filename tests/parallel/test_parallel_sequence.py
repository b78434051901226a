"""Where tokens of a sequence lie, and which chunks see which."""

import pytest
import torch

from bloomery.parallel.sequence import Layout, View, zigzag


def test_zigzag_pairs_an_early_chunk_with_a_late_one():
    assert zigzag(16, 2, 0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert zigzag(16, 2, 1).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert Layout(8, 2, "contiguous").index(1).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_token_lies_somewhere_once_and_finds_back(ranks, kind):
    layout = Layout(48, ranks, kind)
    tokens = torch.randn(2, 48, 3)
    parts = [tokens[:, layout.index(rank)] for rank in range(ranks)]
    assert torch.equal(layout.in_order(torch.cat(parts, 1), 1), tokens)
    assert torch.equal(layout.by_rank(tokens, 1), torch.cat(parts, 1))
    assert all(layout.owner(chunk) == rank for rank in range(ranks) for chunk in layout.chunks(rank))
    assert sorted(layout.arrival) == list(range(layout.num_chunks))


def test_a_length_that_cannot_be_cut_is_refused_with_those_that_can():
    with pytest.raises(ValueError, match=r"sequence of 30 tokens over 4 context ranks, zigzag.* 8; choose 24 or 32"):
        Layout(30, 4)
    with pytest.raises(ValueError, match="expected a multiple of 8; choose 8 tokens"):
        Layout(0, 4)
    assert Layout.padded(30, 4) == 32
    assert Layout.padded(30, 3, "contiguous") == 30


def _by_hand(layout, ids, window):
    """What each pair of chunks sees, token by token."""
    place = torch.arange(layout.seq)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < (window or layout.seq))
    seen = seen[None] if ids is None else seen & (ids[:, :, None] == ids[:, None, :])
    return seen.unflatten(1, (layout.num_chunks, -1)).unflatten(3, (layout.num_chunks, -1))


@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("documents", [None, "aligned", "across", "one"])
def test_a_view_knows_what_chunks_see_of_each_other(window, documents):
    ids = {
        None: None,
        "aligned": torch.tensor([[0] * 8 + [1] * 8 + [2] * 8] * 2),
        "across": torch.tensor([[0] * 3 + [1] * 14 + [2] * 7, [5] * 12 + [9] * 12]),
        "one": torch.ones(2, 24, dtype=torch.int64),
    }[documents]
    layout = Layout(24, 3)
    view, seen = View(layout, ids, window, torch.device("cpu")), _by_hand(layout, ids, window)
    for query in range(6):
        for key in range(6):
            block, kind = seen[:, query, :, key], view.table[query][key]
            found = view.mask(query, key, slice(0, 4)).expand(len(block), -1, -1)
            assert torch.equal(found, block)
            assert view.sees([query], [key]) == bool(block.any())
            assert kind == ("causal" if query == key else "all") or not block.all()
            if kind == "causal":
                assert torch.equal(block, torch.ones_like(block).tril())
            elif kind in ("none", "all"):
                assert bool(block.any()) == bool(block.all()) == (kind == "all")
