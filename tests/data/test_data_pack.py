from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomery.data.pack import best_fit, pack_concatenated, pack_whole, split_long, to_batch
from bloomery.errors import ArtifactError

PAD = 99


def array(*values):
    return np.array(values, dtype=np.int32)


def test_best_fit_takes_the_tightest_bin():
    # Decreasing: 7 | 6 | then 4 fits neither; 4 → new bin; 3 goes with 7 (tightest: leaves 0), not with 6 or 4.
    assert best_fit([3, 7, 4, 6], 10) == [[1, 0], [3, 2]]
    assert best_fit([5, 5, 5], 10) == [[0, 1], [2]]
    assert best_fit([10, 10], 10) == [[0], [1]]
    assert best_fit([], 10) == []


@given(st.integers(1, 40), st.data())
def test_best_fit_loses_nothing_and_never_overflows(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins = best_fit(lengths, capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in members) for members in bins]
    assert all(load <= capacity for load in loads)
    assert sum(load * 2 <= capacity for load in loads) <= 1  # two half-empty bins would have been one


@pytest.mark.parametrize(("size", "pieces"), [(1, 1), (4, 1), (5, 2), (7, 2), (8, 3), (10, 3)])
def test_split_pieces_predict_every_id_but_the_first_once(size, pieces):
    parts = split_long(np.arange(size), 4)
    assert len(parts) == pieces
    assert all(len(part) <= 4 for part in parts)
    assert [label for part in parts for label in part[1:]] == list(range(1, size))


def test_whole_documents_by_hand():
    rows, lengths = pack_whole([array(1, 2), array(3, 4, 5), array(6, 7, 8, 9)], 6, PAD)
    assert rows.tolist() == [[6, 7, 8, 9, 1, 2], [3, 4, 5, PAD, PAD, PAD]]
    assert [row.tolist() for row in lengths] == [[4, 2], [3]]


def test_concatenation_by_hand():
    rows, lengths = pack_concatenated([array(1, 2, 3), array(4, 5), array(6, 7, 8, 9)], 5, PAD)
    assert rows.tolist() == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]]
    assert [row.tolist() for row in lengths] == [[3, 2], [1, 4]]
    rows, lengths = pack_concatenated([array(1, 2, 3), array(4, 5, 6)], 5, PAD)
    assert rows.tolist() == [[1, 2, 3, 4, 5], [5, 6, PAD, PAD, PAD]]
    assert [row.tolist() for row in lengths] == [[3, 2], [2]]


@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=20),
    st.integers(3, 12),
    st.sampled_from(["whole", "concatenated"]),
)
@settings(max_examples=150, deadline=None)
def test_every_prediction_inside_a_document_is_made_exactly_once(sizes, length, packing):
    """The oracle: pairs (token, next token of the same document), all tokens distinct."""
    ends = np.cumsum(sizes)
    documents = [np.arange(end - size, end, dtype=np.int32) for size, end in zip(sizes, ends, strict=True)]
    expected = sorted((int(a), int(b)) for document in documents for a, b in pairwise(document))
    if packing == "whole":
        rows, lengths = pack_whole(
            [part for document in documents for part in split_long(document, length)], length, -7
        )
    else:
        rows, lengths = pack_concatenated(documents, length, -7)
    batch = to_batch(rows, lengths)
    learnt = batch["labels"] != -100
    pairs = zip(batch["input_ids"][learnt].tolist(), batch["labels"][learnt].tolist(), strict=True)
    assert sorted(pairs) == expected


def test_batch_by_hand():
    rows = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, PAD, PAD, PAD]], dtype=np.int32)
    batch = to_batch(rows, [array(2, 4), array(3)], sources=np.array([4, 2]))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, PAD, PAD]]
    assert batch["labels"].tolist() == [[2, -100, 4, 5, 6], [8, 9, -100, -100, -100]]
    assert batch["segment_ids"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert batch["source_ids"].tolist() == [[4] * 5, [2] * 5]
    kinds = {"input_ids": torch.int64, "labels": torch.int64, "position_ids": torch.int64}
    kinds |= {"segment_ids": torch.int32, "source_ids": torch.int16}
    assert {name: tensor.dtype for name, tensor in batch.items()} == kinds


def test_mask_by_hand():
    rows = np.array([[1, 2, 3, 4, 5]], dtype=np.int32)
    learnt = np.array([[True, False, True, True, False]])
    batch = to_batch(rows, [array(2, 3)], learnt)
    assert batch["labels"].tolist() == [[-100, -100, 4, -100]]  # id 3 starts a document: nothing predicts it


def test_rows_of_one_document_need_no_segments():
    batch = to_batch(np.array([[1, 2, 3]], dtype=np.int32), [array(3)])
    assert set(batch) == {"input_ids", "labels"}
    last_is_new = to_batch(np.array([[1, 2, 3, 4]], dtype=np.int32), [array(3, 1)])
    assert "segment_ids" not in last_is_new  # the other document is only a label, and that is masked
    assert last_is_new["labels"].tolist() == [[2, 3, -100]]


def test_a_batch_without_labels_is_refused():
    rows = np.array([[1, 2, 3]], dtype=np.int32)
    with pytest.raises(ArtifactError, match="every label of this batch is masked, so it teaches nothing"):
        to_batch(rows, [array(3)], np.zeros((1, 3), dtype=bool))
    with pytest.raises(ArtifactError, match="every label of this batch is masked"):
        to_batch(rows, [array(1, 1, 1)])
