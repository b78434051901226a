"""The ledger: what was read, of each source and of each row, whatever the number of ranks and attempts."""

import json

import numpy as np
import pytest

from bloomery.data import ledger as ledgers
from bloomery.data.ledger import Ledger
from bloomery.data.plan import Plan
from bloomery.errors import DivergenceError

PLAN = Plan(("web", "math"), (40, 6), ((50, 10), (5, 35)), seed=3)


def read(plan, *windows):
    """A ledger of these windows of the plan."""
    found = Ledger(plan.sources, plan.rows)
    for start, stop in windows:
        source, row, _ = plan.draw(start, stop)
        found.add(source, row, np.full(stop - start, 8))
    return found


def test_over_both_phases_no_row_is_read_more_than_once_oftener_than_another():
    found = read(PLAN, (0, 100))
    for reads in found.reads:
        assert reads.max() - reads.min() <= 1
    assert [reads.sum() for reads in found.reads] == [55, 45]
    found.verify(PLAN, 0, 100)
    summary = found.summary([np.full(40, 8), np.full(6, 8)])
    assert summary["web"] == {
        "sequences": 55, "tokens": 440, "epochs": 1.375, "unique_tokens": 320, "most_reads": 2,
    }  # fmt: skip
    assert summary["math"]["most_reads"] == 8


def test_a_second_phase_that_starts_its_sources_anew_is_noticed():
    """Counts are those of the plan; only rows tell."""
    first, second = Plan(PLAN.sources, PLAN.rows, PLAN.counts[:1], 3), Plan(PLAN.sources, PLAN.rows, PLAN.counts[1:], 3)
    found = read(first, (0, 60)) + read(second, (0, 40))
    assert found.sequences.tolist() == [55, 45]
    with pytest.raises(DivergenceError, match=r"source web: row \d+ was read \d times .*; rows were replayed or left"):
        found.verify(PLAN, 0, 100)


def test_ranks_and_attempts_add_up():
    """Two ranks, a cut, then three ranks that go on from the saved ledger."""
    saved = json.loads(json.dumps((read(PLAN, (0, 8), (16, 24)) + read(PLAN, (8, 16), (24, 32))).to_json()))
    rest = [read(PLAN, (start, 100 if start == 78 else start + 23)) for start in (32, 55, 78)]
    whole = sum(rest, Ledger(PLAN.sources, PLAN.rows))
    whole.add_json(saved)
    whole.verify(PLAN, 0, 100)
    assert all(np.array_equal(a, b) for a, b in zip(whole.reads, read(PLAN, (0, 100)).reads, strict=True))


def test_a_ledger_goes_on_in_a_blend_with_more_sources_and_fewer_tracked_rows(monkeypatch):
    monkeypatch.setattr(ledgers, "TRACKED_ROWS", 64)
    begun = read(PLAN, (0, 60))
    more = Plan(("new", "web", "math"), (100, 40, 6), ((30, 5, 35),), 3)
    plan = PLAN.until(60).then(more)
    rest = read(plan, (60, plan.num_sequences))
    assert (begun.every, rest.every) == (1, 4)
    rest.add_json(begun.to_json())
    rest.verify(plan, 0, plan.num_sequences)
    rest.sequences[0] -= 1
    with pytest.raises(DivergenceError, match="source new: 29 sequences were read"):
        rest.verify(plan, 0, plan.num_sequences)


def test_of_a_huge_blend_a_sample_of_rows_is_counted(monkeypatch):
    monkeypatch.setattr(ledgers, "TRACKED_ROWS", 1000)
    plan = Plan(("big",), (100_000,), ((150_000,),), 0)
    found = read(plan, (0, 150_000))
    assert (found.every, len(found.reads[0])) == (128, 782)
    found.verify(plan, 0, 150_000)
    unique = found.summary([np.full(100_000, 8)])["big"]["unique_tokens"]
    assert unique == pytest.approx(800_000, rel=0.01)
