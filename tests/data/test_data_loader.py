from itertools import chain

import numpy as np
import pytest
import torch

from bloomery.data.chat import Examples
from bloomery.data.loader import ExampleRows, batches
from bloomery.errors import ConfigError


def examples(*lengths):
    """Example k holds the id k + 1 throughout; all but its first token are learnt."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)
    learnt = np.ones(len(ids), dtype=bool)
    learnt[offsets[:-1]] = False
    return Examples(ids, learnt, offsets, np.arange(len(lengths), dtype=np.int16) % 2, ("a", "b"))


class Counted:
    """Sequences whose ids are their own numbers."""

    def __init__(self, num_sequences=None):
        self.num_sequences = num_sequences

    def batch(self, start, stop):
        return {"input_ids": torch.arange(start, stop)[:, None]}


def ids(steps):
    return [torch.cat([micro["input_ids"] for micro in step]).flatten().tolist() for step in steps]


def test_a_step_is_the_same_sequences_whatever_the_number_of_ranks():
    alone = ids(batches(Counted(24), 0, 8, 2))
    assert alone == [list(range(8)), list(range(8, 16)), list(range(16, 24))]
    for world in (2, 4):
        ranks = [ids(batches(Counted(24), 0, 8, 2, rank, world)) for rank in range(world)]
        assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == alone


def test_resuming_at_a_position_continues():
    assert ids(batches(Counted(24), 16, 8, 4)) == [list(range(16, 24))]
    assert ids(batches(Counted(24), 24, 8, 4)) == []


def test_a_step_that_would_be_cut_short_is_not_begun():
    assert len(ids(batches(Counted(23), 0, 8, 4))) == 2


@pytest.mark.parametrize(("batch", "micro", "world"), [(6, 4, 1), (8, 4, 4), (0, 1, 1), (4, 0, 1)])
def test_batches_that_do_not_divide_are_refused_at_once(batch, micro, world):
    with pytest.raises(ConfigError, match=r"batch_size: .* is not a multiple of micro_batch_size"):
        batches(Counted(), 0, batch, micro, 0, world)


def test_every_epoch_holds_every_example_once_in_a_new_order():
    rows = ExampleRows(examples(*[3, 5, 4, 6, 2, 5, 7, 3]), seq_len=9, seed=1, pad_id=0)
    orders = []
    for epoch in range(3):
        seen = torch.cat([rows.batch(k, k + 1)["input_ids"] for k in range(epoch * len(rows), (epoch + 1) * len(rows))])
        assert sorted(set(seen.flatten().tolist()) - {0}) == list(range(1, 9))
        orders.append(tuple(seen[:, 0].tolist()))
    assert len(set(orders)) == 3
    assert rows.epoch(2 * len(rows)) == 2.0


def test_the_order_depends_on_the_seed_alone():
    data = examples(*[3] * 40)
    first, again, other = (ExampleRows(data, 3, seed, 0) for seed in (1, 1, 2))
    assert torch.equal(first.batch(7, 60)["input_ids"], again.batch(7, 60)["input_ids"])
    assert not torch.equal(first.batch(0, 20)["input_ids"], other.batch(0, 20)["input_ids"])


def test_packed_rows_keep_examples_apart():
    rows = ExampleRows(examples(4, 3), seq_len=7, seed=0, pad_id=0)
    assert len(rows) == 1
    batch = rows.batch(0, 1)
    assert batch["input_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2]]
    assert batch["labels"].tolist() == [[1, 1, 1, -100, 2, 2, -100]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["source_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_packing_can_be_switched_off():
    rows = ExampleRows(examples(4, 3), seq_len=5, seed=0, pad_id=0, packing=False)
    assert len(rows) == 2
    batch = rows.batch(0, 2)
    assert sorted(batch["input_ids"].tolist()) == [[1, 1, 1, 1, 0], [2, 2, 2, 0, 0]]
    assert (batch["labels"] != -100).sum() == 3 + 2


def test_an_example_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"seq_len: 5 does not hold an example of 7 tokens; encode with max_tokens=6"):
        ExampleRows(examples(3, 7), 5, 0, 0)
