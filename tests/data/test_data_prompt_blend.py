"""Shares of prompts: the weights of each rule by hand, and counts that are exact in every step."""

import numpy as np
import pytest

from bloomery import config as configs
from bloomery.data.prompt_blend import PromptBlend, Systematic, cells, interleaved, weights
from bloomery.data.prompts import Prompt
from bloomery.errors import ConfigError


def prompts(**sizes: int) -> list[Prompt]:
    """`domain_source_form=size`, with numbered tokens."""
    made = []
    for name, size in sizes.items():
        domain, source, form = name.split("_")
        made += [Prompt(f"{source}{i}", source, [], "1", "answer", (len(made) + i,), domain, form) for i in range(size)]
    return made


CORPUS = prompts(gpr_mmlu_choice=40, gpr_synth_choice=80, gpr_natural_open=40, math_numina_open=60, math_small_open=20)


def shares(corpus: list[Prompt] = CORPUS, hardness: tuple[float, ...] = (), **settings: object) -> dict[str, float]:
    blend = configs.build(PromptBlend, settings)
    found = cells(corpus, blend)
    return {source: share for (_, source), share in zip(found, weights(found, blend, hardness).tolist(), strict=True)}


def test_natural_shares_are_sizes():
    assert shares() == pytest.approx(
        {"mmlu": 40 / 240, "synth": 80 / 240, "natural": 40 / 240, "numina": 60 / 240, "small": 20 / 240}
    )


def test_two_to_one_by_domain_and_the_sizes_inside():
    """w = s_k n_d / Σ n_e: 2/3 · 40/160, …"""
    assert shares(shares={"math": 1, "gpr": 2}) == pytest.approx(
        {"mmlu": 1 / 6, "synth": 1 / 3, "natural": 1 / 6, "numina": 1 / 4, "small": 1 / 12}
    )
    assert shares(shares={"math": 2, "others": 1}) == pytest.approx(
        {"mmlu": 1 / 12, "synth": 1 / 6, "natural": 1 / 12, "numina": 1 / 2, "small": 1 / 6}
    )


def test_by_form_and_one_group_only():
    by_form = shares(by="form", shares={"choice": 2, "open": 1})
    assert by_form["mmlu"] + by_form["synth"] == pytest.approx(2 / 3)
    assert shares(shares={"math": 1}) == pytest.approx({"numina": 0.75, "small": 0.25})
    assert shares(by="form", shares={"open": 1, "choice": 0}).keys() == {"natural", "numina", "small"}


def test_scores_and_difficulty_replace_sizes():
    scores = {"mmlu": 35, "synth": 45, "natural": 40, "numina": 60, "small": 20}
    assert shares(scores=scores)["numina"] == pytest.approx(60 / 200)
    assert "small" not in shares(scores=scores | {"small": 0})
    hardness = tuple(0.5 if prompt.source == "small" else 0.25 for prompt in CORPUS)
    assert shares(hardness=hardness, difficulty=True)["small"] == pytest.approx(10 / 65)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": {"law": 1}}, "blend.shares.law: no prompt of it; domains found: gpr, math"),
        ({"shares": {"math": -1}}, "shares.math: found -1.0, expected a number of at least 0"),
        ({"shares": {"math": 0}}, "shares: all are 0"),
        ({"shares": {"math": float("nan")}}, "shares.math: found nan"),
        ({"scores": {"mmlu": 1}}, "blend.scores.natural: missing"),
        ({"scores": {"lost": 1}}, "blend.scores.lost: no such source"),
        ({"scores": {"mmlu": 1}, "difficulty": True}, "difficulty: has no effect beside scores"),
    ],
)
def test_bad_blends_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        shares(**settings)


def test_a_group_without_any_weight_is_named():
    hardness = tuple(0.0 if prompt.domain == "math" else 1.0 for prompt in CORPUS)
    with pytest.raises(ConfigError, match="nothing in math has a weight"):
        shares(hardness=hardness, difficulty=True, shares={"math": 1, "gpr": 1})


def test_by_counts_natural_and_two_to_one_are_one_mixture():
    """Nemotron-CrossThink reports both and 2.5 points between them; by its table of sizes they are the same."""
    sizes = {"mmlu": 99_842, "syn": 192_930, "natural": 100_000, "numina": 87_350, "persona": 100_000, "math": 8_523}
    total = sum(sizes.values())
    gpr = sum(list(sizes.values())[:3])
    for name, size in sizes.items():
        share, group = (2 / 3, gpr) if name in ("mmlu", "syn", "natural") else (1 / 3, total - gpr)
        assert abs(share * size / group - size / total) < 0.001


@pytest.mark.parametrize("count", [1, 7, 32])
@pytest.mark.parametrize("given", [(1, 2), (0.05, 0.15, 0.8), (1, 1, 1, 1, 1, 1, 1), (1e-6, 1), (3,)])
def test_every_step_holds_its_share_to_within_one(given, count):
    w = np.array(given) / sum(given)
    drawn = Systematic(w, count, seed=3)
    total = np.zeros(len(w))
    for step in range(200):
        counts = drawn.counts(step)
        assert counts.sum() == count
        assert (np.abs(counts - count * w) < 1).all()
        assert (drawn.before(step) == total).all()
        total += counts
        assert (np.abs(total - (step + 1) * count * w) < 4).all()  # and does not drift


def test_parts_of_a_step_have_the_shares_of_the_whole():
    order = interleaved([8, 4, 4])
    assert sorted(order) == [0] * 8 + [1] * 4 + [2] * 4
    for start in (0, 4, 8, 12):
        assert sorted(order[start : start + 4]) == [0, 0, 1, 2]
