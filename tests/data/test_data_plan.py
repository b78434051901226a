import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomery.data.ledger import Ledger
from bloomery.data.plan import Phase, Plan, check_weights, largest_remainder, make_plan
from bloomery.errors import ConfigError, DivergenceError

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any)


def plan_of(*counts, rows=None, seed=0):
    names = tuple(f"s{n}" for n in range(len(counts[0])))
    return Plan(names, tuple(rows or [max(1, count) for count in counts[0]]), tuple(map(tuple, counts)), seed)


@pytest.mark.parametrize(
    ("shares", "total", "expected"),
    [
        ([1, 1, 1], 10, [4, 3, 3]),
        ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
        ([47000, 16000, 15800, 12000, 6100, 3100], 10, [5, 2, 1, 1, 1, 0]),
        ([1, 0, 1], 3, [2, 0, 1]),
        ([5], 7, [7]),
    ],
)
def test_largest_remainder_against_hand_computed_numbers(shares, total, expected):
    assert largest_remainder(np.array(shares, dtype=float), total).tolist() == expected


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda s: sum(s) > 1e-3), st.integers(0, 10**9))
def test_largest_remainder_is_exact_and_within_one(shares, total):
    counts = largest_remainder(np.array(shares), total)
    assert counts.sum() == total
    assert np.all(np.abs(counts - np.array(shares) / sum(shares) * total) < 1 + 1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0, "b": -0.1}, r"weights\.b: found -0.1, expected a number of at least 0"),
        ({"a": float("nan")}, r"weights\.a: found nan"),
        ({"a": float("inf")}, r"weights\.a: found inf"),
        ({"a": 0.0}, "all are 0"),
        ({}, "there are none"),
    ],
)
def test_impossible_weights_are_named(weights, message):
    with pytest.raises(ConfigError, match=message):
        check_weights(weights)


def test_zero_weight_is_legal():
    check_weights({"a": 1.0, "b": 0.0})


@given(COUNTS, st.data())
@settings(max_examples=80, deadline=None)
def test_any_window_is_that_part_of_the_whole_order(counts, data):
    plan, total = plan_of(counts), sum(counts)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    whole, window = plan.order(0, total), plan.order(start, stop)
    assert all(np.array_equal(part, all_[start:stop]) for part, all_ in zip(window, whole, strict=True))
    assert plan.counts_at(stop).tolist() == np.bincount(whole[0][:stop], minlength=len(counts)).tolist()
    assert plan.counts_at(total).tolist() == counts


def test_prefix_deviation_is_small_for_a_real_blend():
    shares = np.array([22.4, 10.3, 6.5, 5.7, 4.3, 14, 6.4, 5, 9.2, 3.9, 1.6, 4.9, 2.1, 1.6, 1.4, 0.6])
    counts = largest_remainder(shares, 40_000)
    source, _ = plan_of(counts.tolist()).order(0, 40_000)
    seen = np.cumsum(source[:, None] == np.arange(len(counts)), axis=0)
    error = np.abs(seen - shares / shares.sum() * np.arange(1, 40_001)[:, None]).max()
    assert error < 1.5  # independent draws would be off by about 100


def test_order_far_into_a_huge_plan_is_exact():
    counts = [700_000_000_000, 299_999_999_990, 10]
    source, number = plan_of(counts).order(500_000_000_000, 500_000_001_000)
    assert len(source) == 1000
    assert abs((source == 0).sum() - 700) <= 2
    for index in (0, 1):
        assert np.array_equal(np.diff(number[source == index]), np.ones((source == index).sum() - 1))


def test_phases_continue_each_source_and_never_restart_it():
    plan = plan_of((30, 10, 0), (5, 20, 15), rows=[20, 20, 20])
    source, number = plan.order(0, plan.num_sequences)
    assert np.bincount(source[:40], minlength=3).tolist() == [30, 10, 0]
    assert np.bincount(source[40:], minlength=3).tolist() == [5, 20, 15]
    for index, drawn in enumerate([35, 30, 15]):
        assert number[source == index].tolist() == list(range(drawn))
    _, row, _ = plan.draw(0, plan.num_sequences)
    for index in range(3):
        seen = np.bincount(row[source == index], minlength=20)
        assert seen.max() - seen.min() <= 1


def test_windows_that_span_phases_join_up():
    plan = plan_of((7, 3), (2, 8), (5, 5))
    whole = np.stack(plan.order(0, 30))
    for start in range(0, 30, 4):
        assert np.array_equal(np.stack(plan.order(start, min(30, start + 11))), whole[:, start : start + 11])
    with pytest.raises(ConfigError, match="sequences 25 to 31: the plan holds 30"):
        plan.order(25, 31)


def test_each_epoch_visits_every_row_once_in_a_new_order():
    plan = plan_of((90,), rows=[30], seed=5)
    _, row, epoch = plan.draw(0, 90)
    assert epoch.tolist() == [0] * 30 + [1] * 30 + [2] * 30
    epochs = row.reshape(3, 30)
    assert all(sorted(order) == list(range(30)) for order in epochs.tolist())
    assert len({tuple(order) for order in epochs.tolist()}) == 3
    assert plan_of((90,), rows=[30], seed=6).draw(0, 90)[1].tolist() != row.tolist()


def test_adding_a_source_does_not_reorder_the_others():
    small, large = plan_of((20,), rows=[20]), plan_of((20, 20), rows=[20, 20])
    source, row, _ = large.draw(0, 40)
    assert row[source == 0].tolist() == small.draw(0, 20)[1].tolist()


def test_weights_are_shares_of_tokens_not_of_rows():
    plan = make_plan(["full", "half"], [100, 100], [256, 128], [(1.0, {"full": 1, "half": 1})], 300, 0)
    assert plan.counts == ((100, 200),)
    assert plan.epochs.tolist() == [1.0, 2.0]


def test_phases_share_the_sequences_exactly():
    phases = [(0.6, {"a": 1.0}), (0.4, {"a": 1.0, "b": 3.0})]
    plan = make_plan(["a", "b"], [10, 10], [64, 64], phases, 101, 0)
    assert plan.counts == ((61, 0), (10, 30))


def test_weight_on_a_source_without_rows_is_refused():
    with pytest.raises(ConfigError, match=r"source b: has weight 0\.5 but no rows"):
        make_plan(["a", "b"], [10, 0], [64, 0], [(1.0, {"a": 1.0, "b": 0.5})], 10, 0)


def test_a_plan_survives_json_and_its_digest_tells_plans_apart():
    plan = plan_of((7, 3), (2, 8))
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).digest == plan.digest
    assert plan_of((7, 3), (3, 7)).digest != plan.digest


def test_ledgers_of_two_ranks_add_up_to_the_plan_and_a_difference_is_named():
    plan = plan_of((6, 2))
    source, row, _ = plan.draw(0, 8)
    first, second = Ledger(plan.sources, plan.rows), Ledger(plan.sources, plan.rows)
    first.add(source[:4], row[:4], np.full(4, 10))
    second.add(source[4:], row[4:], np.full(4, 12))
    total = first + second
    total.verify(plan, 0, 8)
    assert total.summary()["s0"]["sequences"] == 6
    assert total.tokens.sum() == 88
    assert total.summary()["s1"]["epochs"] == 1.0
    with pytest.raises(DivergenceError, match=r"source s0: 3 sequences were read in \[0, 8\), the plan says 6"):
        first.verify(plan, 0, 8)


def deviation(plan, phase, window=2**16):
    """The largest distance of a source's draws from its share at any place of a phase: before and after each draw."""
    counts = np.array(plan.counts[phase])
    start, total, worst = plan.ends[phase] - plan.lengths[phase], counts.sum(), 0.0
    for begin in range(0, total, window):
        stop = min(total, begin + window)
        source, number = plan.order(start + begin, start + stop)
        number, place = number - plan.counts_at(start)[source], np.arange(begin, stop)
        share = counts[source] / total
        worst = max(worst, (number + 1 - share * (place + 1)).max(), (share * place - number).max())
    return worst


ULTRA = [22.4, 10.3, 6.5, 5.7, 4.3, 14, 6.4, 5, 9.2, 3.9, 1.6, 4.9, 2.1, 1.6, 1.4, 0.6]


@pytest.mark.parametrize(
    "shares",
    [ULTRA, [0.15, 0.5, 0.1, 0.1, 0.1, 0.05], [1, 1, 1, 1, 0.001], [1] * 7, [0.5, *[0.0005] * 1000],
     np.random.default_rng(1).dirichlet([1.0] * 47), 1 / np.arange(1, 1001)],
    ids=["ultra", "tiny", "dust", "equal", "one and many", "dirichlet", "zipf"],
)  # fmt: skip
def test_no_source_is_ever_more_than_a_sequence_off_its_share(shares):
    """Independent draws would be off by about 100; of these blends, one reaches 1.004."""
    assert deviation(plan_of(largest_remainder(shares, 100_000).tolist()), 0) <= 1.005


def test_both_ways_through_the_tree_agree():
    """Few draws are taken down one by one, many by visiting each node once."""
    counts = largest_remainder(1 / np.arange(1, 41), 10**12)
    plan = plan_of(counts.tolist())
    many = plan.order(10**11, 10**11 + 1000)
    few = [plan.order(start, start + 50) for start in range(10**11, 10**11 + 1000, 50)]
    assert all(np.array_equal(np.concatenate([part[i] for part in few]), many[i]) for i in (0, 1))


def test_a_ramp_moves_from_one_blend_to_the_next_and_counts_stay_exact():
    phases = [Phase(0.5, {"a": 3, "b": 1}), Phase(0.5, {"a": 1, "b": 3}, ramp=0.4)]
    plan = make_plan(["a", "b"], [10, 10], [1, 1], phases, 80_000, 0)
    assert plan.num_sequences == 80_000
    assert plan.counts[0] == (30_000, 10_000)
    shares = [phase[0] / sum(phase) for phase in plan.counts[1:]]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(0.75 - 0.5 / 32, abs=1e-3)
    assert shares[8] == pytest.approx(0.5 - 0.5 / 32, abs=1e-3)
    assert plan.drawn.tolist() == [30_000 + 8_000 + 6_000, 10_000 + 8_000 + 18_000]
    assert all(deviation(plan, phase) <= 1 for phase in range(len(plan.counts)))


def test_the_controls_read_the_same_sequences_in_another_order():
    plan = plan_of((60, 20, 0), (10, 50, 60), rows=[20, 20, 20])
    for control in (plan.random_order(), plan.reversed()):
        assert control.drawn.tolist() == plan.drawn.tolist()
        assert control.order(0, 200)[0].tolist() != plan.order(0, 200)[0].tolist()
    assert plan.reversed().counts == ((10, 50, 60), (60, 20, 0))
    assert deviation(plan.random_order(), 0) <= 1


def test_a_plan_can_end_early_and_another_go_on_from_there():
    trunk = plan_of((60, 20), rows=[30, 30], seed=4)
    other = Plan(("s1", "new", "s0"), (30, 9, 30), ((25, 10, 5),), seed=4)
    plan = trunk.until(50).then(other)
    assert plan.num_sequences == 90
    names = [np.array(found.sources)[found.order(0, 50)[0]].tolist() for found in (trunk, plan)]
    assert names[0] == names[1]
    assert [a.tolist() for a in trunk.draw(0, 50)[1:]] == [a.tolist() for a in plan.draw(0, 50)[1:]]
    source, row, _ = plan.draw(0, 90)
    for index, rows in enumerate(plan.rows):
        reads = np.bincount(row[source == index], minlength=rows)
        assert reads.max() - reads.min() <= 1
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ConfigError, match="source s0: 30 rows in the plan to go on from, here 29 rows; blend"):
        trunk.then(Plan(("s0", "s1"), (29, 30), ((1, 1),), 4))
    with pytest.raises(ConfigError, match="source s1: 30 rows in the plan to go on from, here no such source"):
        trunk.then(Plan(("s0",), (30,), ((1,),), 4))


def test_a_weight_that_rounds_to_nothing_is_refused():
    with pytest.raises(ConfigError, match="source b: its weight is less than half a sequence of this plan of 100"):
        make_plan(["a", "b"], [10, 10], [1, 1], [(1.0, {"a": 1000, "b": 1})], 100, 0)


def test_more_sources_than_a_batch_can_number_are_refused():
    with pytest.raises(ConfigError, match="40000 sources; expected at most 32766"):
        check_weights({str(number): 1.0 for number in range(40_000)})
