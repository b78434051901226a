"""The claim on the hybrid's quality: its arms match, its strings have the answers they mark, its verdicts follow."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest

from bloomery.claim import load
from bloomery.data.pack import Batch


@pytest.fixture(scope="module")
def claim() -> ModuleType:
    load("hybrid-quality", Path(__file__).parent.parent)
    return sys.modules["claims.hybrid_quality"]


def test_arms_differ_in_mixers_and_positions_alone(claim: ModuleType) -> None:
    sizes = {arm: claim.config(arm).count_parameters() for arm in claim.ARMS}
    assert all(abs(size / sizes["hybrid"] - 1) <= 0.01 for size in sizes.values()), sizes
    kinds = {arm: set(claim.config(arm).pattern) for arm in claim.ARMS}
    assert kinds == {"hybrid": {*"M*-"}, "hybrid-rope": {*"M*-"}, "mamba": {*"M-"}, "transformer": {*"*-"}}
    assert {arm for arm in claim.ARMS if claim.config(arm).rope} == {"transformer", "hybrid-rope"}


def test_a_recall_row_answers_from_its_own_block(claim: ModuleType) -> None:
    text, answers = claim.corpus.recall(Random(7), 128)
    assert len(text) == len(answers) == 129
    seen: dict[int, int] = {}
    for place, asked in enumerate(answers):
        if text[place : place + 1] == b"?":
            seen = {}
        elif asked:
            assert seen[text[place - 1]] == text[place]
        elif text[place : place + 1].isdigit():
            seen[text[place - 1]] = text[place]
    assert answers.sum() > 20


def test_a_copy_row_marks_what_was_said_before(claim: ModuleType) -> None:
    text, answers = claim.corpus.copying(Random(7), 128)
    said = bytes(np.frombuffer(text, np.uint8)[answers])
    first = text.split(b'"')[1]
    assert said.startswith(first)
    assert len(text) == len(answers) == 129


def rows_of(batches: Iterator[list[Batch]]) -> np.ndarray:
    return np.concatenate([batch["input_ids"].numpy() for [batch] in itertools.islice(batches, 40)])


def test_batches_are_the_seeds_own_and_a_tenth_is_strings(claim: ModuleType) -> None:
    corpus = claim.corpus
    drawn = [rows_of(corpus.batches(seed, 32, 128)) for seed in (5, 5, 6)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    strings = np.isin(drawn[0], list(b'abcdefghijklmnopqrstuvwxyz0123456789?"')).all(1).mean()
    assert 0.07 < strings < 0.14
    held_out = {row.tobytes() for row in corpus.held_out_text(256, 128)}
    trained = {row.tobytes() for row in corpus._text(128)[0]}
    assert not held_out & trained


def made_up(claim: ModuleType, loss: dict[str, float], recall: dict[str, float]) -> list[str]:
    cells = {}
    for arm in claim.ARMS:
        for seed in range(5):
            noise = Random(f"{arm} {seed}")
            losses = [loss.get(arm, 2.0) + 0.3 * row % 1 + noise.gauss(0, 0.002) for row in range(32)]
            accuracies = [recall.get(arm, 0.6) + noise.gauss(0, 0.01) for row in range(32)]
            cells[arm, seed] = {
                "text loss": float(np.mean(losses)), "text loss of rows": losses,
                "recall accuracy": float(np.mean(accuracies)), "recall accuracy of rows": accuracies,
            }  # fmt: skip
    return [finding.verdict for finding in claim.CLAIM.findings(cells)]


def test_verdicts(claim: ModuleType) -> None:
    assert made_up(claim, {}, {"mamba": 0.3}) == ["shown"] * 5
    assert made_up(claim, {"transformer": 2.1}, {"mamba": 0.9})[::3] == ["not shown", "not shown"]
    assert made_up(claim, {"hybrid": 2.1}, {"transformer": 0.9})[2::2] == ["not shown", "not shown"]


def test_who_recalls_better_is_not_judged_among_those_who_guess(claim: ModuleType) -> None:
    guessing = dict.fromkeys(claim.ARMS, claim.CHANCE)
    assert made_up(claim, {}, guessing)[1:4] == ["not shown", "inconclusive", "inconclusive"]
