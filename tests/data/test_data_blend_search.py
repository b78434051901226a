"""Blend search: on tables with a known law it finds the optimum, says how sure it is, and keeps every cap."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv as csv
import pytest
from scipy.stats import spearmanr

from bloomery.config import load
from bloomery.data import blend_law, blend_search
from bloomery.data.blend_config import BlendConfig
from bloomery.data.blend_proposal import budget_of, propose
from bloomery.data.blend_table import Budget, Table, features, read_table
from bloomery.data.explain import explain_config
from bloomery.errors import ArtifactError, ConfigError

SOURCES = ("web", "math", "wiki")
BUDGET = Budget(
    SOURCES, 1000.0, np.array([2000.0, 60.0, 30.0]), np.array([np.inf, 4.0, 4.0]), np.array([0.6, 0.4]),
    np.zeros((2, 3)),
)  # fmt: skip
QUICK = {"draws": 8, "laws": ("exponential",)}
Law = Callable[[np.ndarray], np.ndarray]


def truth(parts: np.ndarray) -> np.ndarray:
    """(n, 2) losses: math and wiki help, late ones more; passes over a source beyond the second cost."""
    web, late = parts[:, :, 0].sum(1), parts[:, 1]
    repeated = np.log(np.maximum(BUDGET.epochs(parts) / 2, 1))
    first = 1 + 2 * np.exp(-3 * parts[:, :, 1].sum(1) - 2 * late[:, 1]) + 0.3 * repeated[:, 1]
    second = 1 + 2 * np.exp(-4 * late[:, 2] - parts[:, :, 2].sum(1) - 0.5 * web) + 0.3 * repeated[:, 2]
    return np.stack([first, second], 1)


def made_table(runs: int = 64, noise: float = 0.01, seed: int = 0, law: Law = truth) -> Table:
    random = np.random.default_rng(seed)
    parts = random.dirichlet(np.full(3, 0.4), size=(runs, 2)) * BUDGET.shares[:, None]
    found = law(parts)
    return Table(
        SOURCES, parts, BUDGET.epochs(parts), ("loss/a", "loss/b"), found + noise * random.normal(size=found.shape)
    )


@cache
def best_of_the_law() -> float:
    """Least mean loss of the blends that keep the caps, of many drawn at random."""
    parts = np.random.default_rng(5).dirichlet(np.full(3, 0.5), size=(200_000, 2)) * BUDGET.shares[:, None]
    return float(truth(parts[(BUDGET.epochs(parts) <= BUDGET.max_epochs).all(1)]).mean(1).min())


def loss_of(proposal: blend_search.Proposal) -> float:
    return float(truth((proposal.weights * proposal.shares[:, None])[None]).mean())


@pytest.fixture(scope="module")
def proposal() -> blend_search.Proposal:
    return blend_search.search(made_table(), BUDGET, draws=16, laws=("linear", "exponential"))


def test_nine_tenths_of_what_a_known_law_allows_is_gained(proposal: blend_search.Proposal) -> None:
    assert proposal.tried is not None
    found, possible, before = loss_of(proposal), best_of_the_law(), proposal.tried.value
    assert before - found > 0.9 * (before - possible)
    assert proposal.objective.low < found < proposal.objective.high


def test_no_cap_is_broken_though_the_law_asks_for_it(proposal: blend_search.Proposal) -> None:
    assert (proposal.epochs <= BUDGET.max_epochs).all()
    assert proposal.epochs[1:].max() > 3.9  # a cap is what stops it
    assert np.allclose(proposal.weights.sum(1), 1)


def test_floors_are_kept_and_without_caps_epochs_rise() -> None:
    floors = np.array([[0.0, 0.1, 0.0], [0.3, 0.0, 0.1]])
    free = replace(BUDGET, floors=floors, max_epochs=np.full(3, np.inf))
    found = blend_search.search(made_table(), free, **QUICK)
    assert (found.weights >= floors - 1e-9).all()
    assert found.epochs[1:].max() > 5


def test_a_cap_below_all_that_was_tried_is_refused_by_name() -> None:
    table = made_table(law=lambda parts: truth(parts))
    parts = 0.5 * table.parts + 0.5 * np.array([0.2, 0.7, 0.1]) * BUDGET.shares[:, None]
    wide = replace(table, parts=parts, epochs=BUDGET.epochs(parts))
    with pytest.raises(ConfigError, match=r"sources\.math: the least of it .* is 5\.\d+ epochs, max_epochs is 4"):
        blend_search.search(wide, BUDGET, **QUICK)


def test_a_small_table_and_a_law_no_better_than_the_mean_are_refused() -> None:
    with pytest.raises(ConfigError, match="12 different blends that vary 4 numbers; expected at least 16"):
        blend_search.search(made_table(12), BUDGET, **QUICK)
    with pytest.raises(ConfigError, match="no law predicts held-out runs better than their mean"):
        blend_search.search(made_table(noise=5.0), BUDGET, laws=("linear",))


def test_seeds_of_one_blend_are_held_out_together_and_count_once() -> None:
    table = made_table(8)
    again = replace(
        table, parts=np.repeat(table.parts, 4, 0), epochs=np.repeat(table.epochs, 4, 0),
        found=np.random.default_rng(0).normal(2, 1, size=(8, 2)).repeat(4, 0),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="holds 8 different blends"):
        blend_law.best_law(again, blend_law.Objective.of(again, {}))
    held_out = blend_law.validate("linear", again, blend_law.Objective.of(again, {}))
    assert held_out.skill.value < 0.5  # a copy in training would give a skill of one


def test_rank_correlation_is_spearmans_with_ties() -> None:
    left, right = [1.0, 2, 2, 3, 9], [5.0, 6, 1, 7, 7]
    assert blend_law.rank_correlation(np.array(left), np.array(right)) == pytest.approx(
        spearmanr(left, right).statistic
    )
    assert blend_law.rank_correlation(np.array(left), np.ones(5)) == 0


def test_scores_count_upwards_and_mixed_targets_must_be_named() -> None:
    table = made_table()
    scores = replace(table, targets=("score/a", "loss/b"), found=table.found * [-1, 1])
    with pytest.raises(ConfigError, match="losses and scores; name the targets"):
        blend_law.Objective.of(scores, {})
    with pytest.raises(ConfigError, match="target loss/c: no such column; the table has score/a, loss/b"):
        blend_law.Objective.of(scores, {"loss/c": 1.0})
    objective = blend_law.Objective.of(scores, {"score/a": 3.0, "loss/b": 1.0})
    assert objective(np.array([[-2.0, 4.0]])) == pytest.approx(0.75 * 2 + 0.25 * 4)


def test_features_are_weights_shares_and_epochs() -> None:
    parts = np.array([[[0.3, 0.3, 0.0], [0.0, 0.1, 0.3]]])
    expected = [0.5, 0.5, 0, 0, 0.25, 0.75, 0.4, *np.log([0.16, 20 / 3 + 0.01, 10.01]), 0, *np.log([20 / 3, 10])]
    assert features(parts, BUDGET.epochs(parts))[0] == pytest.approx(expected)


@pytest.mark.parametrize("law", blend_law.LAWS)
def test_every_law_ranks_what_it_has_not_seen(law: str) -> None:
    predict, new = blend_law.fit(law, made_table()), made_table(100, noise=0.0, seed=9)
    assert blend_law.rank_correlation(predict(features(new.parts, new.epochs))[:, 0], new.found[:, 0]) > 0.9


ROWS = [
    {"phase1/web": 6, "phase1/math": 4, "phase2/wiki": 2, "phase2/web": 2, "loss/a": 2.5, "seed": 1},
    {"phase1/web": 1, "phase1/math": 0, "phase2/wiki": 1, "phase2/web": 0, "loss/a": 2.0, "seed": 2},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_table_is_read_with_weights_relative_and_shares_from_the_plan(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"runs{suffix}"
    lines = [",".join(ROWS[0]), *(",".join(map(str, row.values())) for row in ROWS)]
    file.write_text("\n".join(lines if suffix == ".csv" else map(json.dumps, ROWS)))
    table = read_table(file, BUDGET)
    assert table.parts[0] == pytest.approx(np.array([[0.36, 0.24, 0.0], [0.2, 0.0, 0.2]]))
    assert table.epochs[0] == pytest.approx([0.28, 4.0, 200 / 30])
    assert (table.targets, table.found.tolist()) == (("loss/a",), [[2.5], [2.0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase1/webb": 1}, "column phase1/webb: the plan has no such phase or source; did you mean phase1/web?"),
        ({"phase3/web": 1}, "column phase3/web: the plan has no such phase"),
        ({"phase1/web": -1}, r"row 1: weights of \[-1.0, 4.0, 0.0\]; expected numbers of at least 0"),
        ({"phase2/wiki": 0, "phase2/web": 0}, "row 1: weights of .* not all of them 0, for every phase"),
        ({"loss/a": float("nan")}, "row 1, column loss/a: found nan, expected a finite number"),
        ({"loss/a": None}, "row 1, column loss/a: found None"),
    ],
)
def test_a_bad_table_is_refused_with_row_and_column(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (ROWS[0] | change, ROWS[1] | dict.fromkeys(change, 1.0))))
    with pytest.raises((ArtifactError, ConfigError), match=message):
        read_table(file, BUDGET)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("runs.txt", "", "found a file of type .txt; expected .csv, .jsonl, .parquet"),
        ("runs.jsonl", "{", "not readable as .jsonl: Expecting property name"),
        ("runs.jsonl", "", "the table has no rows"),
        ("runs.parquet", "nothing", "not readable as .parquet"),
        ("runs.jsonl", '{"loss/a": 1}', "no weights; expected columns such as phase1/web"),
        ("runs.jsonl", '{"phase1/web": 1, "phase2/web": 1}', "no column says what a run has found"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((ArtifactError, ConfigError), match=message):
        read_table(tmp_path / name, BUDGET)


SETTINGS = """
sources:
  web: {path: web, unique_tokens: 2000000}
  math: {path: math, unique_tokens: 60000, max_epochs: 4}
  wiki: {path: wiki, unique_tokens: 30000, max_epochs: 4}
tokenizer: tok
seq_len: 64
tokens: 1000000
phases:
  - {share: 0.6, weights: {web: 0.9, math: 0.05, wiki: 0.05}, floors: {wiki: 0.01}}
  - {share: 0.4, weights: {web: 0.5, math: 0.3, wiki: 0.2}}
"""


def test_a_plan_gives_the_budget_and_takes_the_proposal(tmp_path: Path) -> None:
    plan, runs = tmp_path / "blend.yaml", tmp_path / "runs.jsonl"
    plan.write_text(SETTINGS)
    planned = explain_config(load(BlendConfig, plan))
    budget = budget_of(planned)
    assert budget.tokens == pytest.approx(1e6, rel=1e-3)
    assert budget.shares == pytest.approx([0.6, 0.4], abs=1e-4)
    assert budget.floors.tolist() == [[0, 0, 0.01], [0, 0, 0]]
    assert (budget.max_epochs.tolist(), budget.unique_tokens.tolist()) == ([np.inf, 4, 4], [2e6, 6e4, 3e4])
    table = made_table(32)
    columns = [(f"phase{p + 1}/{name}", p, place) for p in range(2) for place, name in enumerate(SOURCES)]
    rows = [
        {name: float(parts[p, place]) for name, p, place in columns} | dict(zip(table.targets, found, strict=True))
        for parts, found in zip(table.parts, table.found.tolist(), strict=True)
    ]
    runs.write_text("\n".join(map(json.dumps, rows)))
    found = propose(runs, planned, {"loss/a": 1.0}, draws=8, seed=0)
    changed = load(BlendConfig, plan, [f"phases={json.dumps(found.phases)}"])
    assert explain_config(changed).plan == found.plan
    assert not explain_config(changed).over
    assert found.as_json()["epochs"]["math"] > 3
    assert f"{found.proposal.law:<12}" in found.text()


def test_a_plan_without_sizes_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "blend.yaml").write_text(SETTINGS.replace(", unique_tokens: 60000", ""))
    with pytest.raises(ConfigError, match=r"sources\.math\.unique_tokens: missing"):
        budget_of(explain_config(load(BlendConfig, tmp_path / "blend.yaml")))


@pytest.mark.slow
def test_a_run_of_the_proposal_falls_into_its_interval_nineteen_times_in_twenty() -> None:
    inside, gained = 0, []
    for seed in range(20):
        found = blend_search.search(made_table(seed=seed), BUDGET, draws=24, laws=("exponential",))
        run = loss_of(found) + 0.01 / 2**0.5 * np.random.default_rng(100 + seed).normal()
        inside += found.objective.low <= run <= found.objective.high
        gained.append(loss_of(found) - best_of_the_law())
    assert inside >= 17, f"inside {inside} of 20"
    assert max(gained) < 0.04, f"above the best possible by {np.mean(gained):.3f}, at most {max(gained):.3f}"


REGMIX = os.environ.get("BLOOMERY_REGMIX")


def regmix(mixtures: str, losses: str) -> Table:
    """A public table of RegMix (arXiv 2407.01492): domain weights and validation losses of one run a row."""
    read = [csv.read_csv(Path(REGMIX or "", name)).to_pydict() for name in (mixtures, losses)]
    place = {number: row for row, number in enumerate(read[0].pop("index"))}
    rows = [place[number] for number in read[1].pop("index")]
    weights = np.stack(list(read[0].values()), 1)[rows]
    parts = (weights / weights.sum(1, keepdims=True))[:, None]
    targets = tuple(f"loss/{name}" for name in read[1])
    return Table(tuple(read[0]), parts, 17 * parts[:, 0], targets, np.stack(list(read[1].values()), 1))


@pytest.mark.slow
@pytest.mark.skipif(REGMIX is None, reason="BLOOMERY_REGMIX names the folder data of github.com/sail-sg/regmix")
@pytest.mark.parametrize(
    ("law", "least"),
    [("linear", (0.97, 0.97, 0.92)), ("trees", (0.985, 0.98, 0.95)), ("exponential", (0.985, 0.98, 0.95))],
)
def test_laws_of_small_runs_rank_the_mixtures_of_larger_ones(law: str, least: tuple[float, ...]) -> None:
    predict = blend_law.fit(law, regmix("train_mixture_1m.csv", "train_pile_loss_1m.csv"))
    for size, wanted in zip(("1m", "60m", "1B"), least, strict=True):
        new = regmix(f"test_mixture_{size}.csv", f"test_pile_loss_{size}.csv")
        said = predict(features(new.parts, new.epochs))
        ranks = [blend_law.rank_correlation(a, b) for a, b in zip(said.T, new.found.T, strict=True)]
        assert np.median(ranks) > wanted, f"{size}: median {np.median(ranks):.3f}, worst {min(ranks):.3f}"
