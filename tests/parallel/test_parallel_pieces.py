"""Pieces of a tensor: counted by hand, and taken apart and put together again for random cuts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomery.parallel.pieces import Box, Piece


def test_sections_are_shared_each_for_itself():
    whole = torch.arange(10)
    piece = Piece.whole((10,)).shard_sections(0, (4, 4, 2), 1, 2)  # 0123 | 4567 | 89
    assert piece.take(whole).tolist() == [2, 3, 6, 7, 9]
    assert piece.boxes == (
        (Box((2,), (2,)), Box((0,), (2,))),
        (Box((6,), (2,)), Box((2,), (2,))),
        (Box((9,), (1,)), Box((4,), (1,))),
    )


def test_a_part_of_a_part_knows_its_place_in_the_whole():
    whole = torch.arange(10)
    piece = Piece.whole((10,)).shard_sections(0, (4, 4, 2), 1, 2)
    left, right = piece.part(Box((0,), (3,))), piece.part(Box((3,), (2,)))
    assert left.take(whole).tolist() == [2, 3, 6]
    assert right.take(whole).tolist() == [7, 9]
    assert right.local == (2,)
    assert right.boxes == ((Box((7,), (1,)), Box((0,), (1,))), (Box((9,), (1,)), Box((1,), (1,))))


def test_two_dimensions_and_nothing():
    whole = torch.arange(24).view(4, 6)
    piece = Piece.whole((4, 6)).shard(0, 1, 2).shard(1, 2, 3)
    assert piece.take(whole).tolist() == [[16, 17], [22, 23]]
    empty = piece.part(Box((2, 0), (0, 2)))
    assert empty.boxes == ()
    assert empty.take(whole).shape == (0, 2)
    assert Piece.whole((0, 3)).boxes == ()
    assert Piece.whole(()).take(torch.tensor(3.0)) == 3


def test_what_does_not_fit_is_refused():
    with pytest.raises(AssertionError, match="3 equal parts of 4"):
        Piece.whole((4,)).shard(0, 0, 3)
    with pytest.raises(AssertionError, match=r"sections \(3, 2\) of 4"):
        Piece.whole((4,)).shard_sections(0, (3, 2), 0, 1)
    with pytest.raises(AssertionError, match=r"\(3,\) is not \(4,\)"):
        Piece.whole((4,)).put(torch.zeros(3), torch.zeros(4))


@settings(deadline=None, max_examples=50)
@given(
    sections=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    tensor=st.sampled_from([1, 2, 3]),
    columns=st.sampled_from([1, 2]),
    data=st.integers(1, 5),
)
def test_all_pieces_together_are_the_whole_once(sections, tensor, columns, data):
    sizes = [tensor * size for size in sections]
    whole = torch.arange(sum(sizes) * 4).view(-1, 4) + 1
    rebuilt, written = torch.zeros_like(whole), torch.zeros_like(whole)
    for index in range(tensor * columns):
        row, column = divmod(index, columns)
        shared = Piece.whole(whole.shape).shard_sections(0, sizes, row, tensor).shard(1, column, columns)
        for rows in torch.arange(shared.local[0]).chunk(data):
            kept = shared.part(Box((int(rows[0]), 0), (len(rows), shared.local[1])))
            kept.put(kept.take(whole), rebuilt)
            ones = torch.zeros_like(whole)
            kept.put(torch.ones(kept.local, dtype=whole.dtype), ones)
            written += ones
    assert torch.equal(rebuilt, whole)
    assert bool((written == 1).all())
