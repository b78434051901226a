"""Curation by verdicts: what is dropped and why; pass rates; what the next epoch holds."""

import pytest

from bloomery import verify
from bloomery.data.document import Document, Drops
from bloomery.posttrain.curate import PassRate, by_difficulty, majority, pass_rates, solvable, unsolved, verifiable
from bloomery.verify import Verdict


def prompt(id: str, question: str, answer: str, verifier: str = "answer") -> Document:
    columns = {"prompt": [{"role": "user", "content": question}], "answer": answer, "verifier": verifier}
    return Document(question, id, columns=columns)


def ids(documents) -> list[str]:
    return [document.id for document in documents]


@pytest.mark.parametrize(
    ("question", "answer", "verifier", "reason"),
    [
        ("What is 2 and 3 together?", "5", "answer", None),
        ("Which one, A or B?", "B", "choice", None),
        ("Simplify $\\sqrt{192}$.", "8\\sqrt{3}", "answer", "answered by its own question"),
        ("Simplify $-10-4(n-5)$ as far as you can", "10-4n", "answer", "answered by its own question"),
        ("What is it?", "9^{9^{9^{9}}}", "answer", "unverifiable answer (gold echo not accepted)"),
        ("What is it?", " ", "answer", "unverifiable answer (gold echo not accepted)"),
        ("Which one?", "B or C", "choice", "unverifiable answer (gold echo not accepted)"),
    ],
)
def test_what_cannot_be_rewarded_is_dropped_with_the_reason(question, answer, verifier, reason):
    drops = Drops()
    kept = ids(verifiable([prompt("p", question, answer, verifier)], verify.judge, drops))
    assert (kept, dict(drops.counts)) == (["p"], {}) if reason is None else ([], {reason: 1})


def test_a_verifier_that_pays_for_everything_leaves_nothing():
    drops = Drops()
    assert not ids(verifiable([prompt("p", "q", "5")], lambda *_: Verdict.of("correct"), drops))
    assert drops.counts == {"pays for nothing (empty)": 1}


def test_missing_verdicts_drop_nothing():
    assert ids(verifiable([prompt("p", "q", "5")], lambda *_: Verdict.of("infra_error"), Drops())) == ["p"]


def test_pass_rates_count_judged_rollouts_alone():
    rows = [{"id": id, "score": score} for id, score in [("a", 1.0), ("a", 0.0), ("a", None), ("b", 0.0), ("c", None)]]
    assert pass_rates(rows) == {"a": PassRate(1, 2), "b": PassRate(0, 1)}
    assert PassRate(1, 2).rate == 0.5
    assert PassRate(0, 0).rate == 0.0


def boxed(*answers: str) -> list[str]:
    return [rf"so \boxed{{{answer}}}" for answer in answers]


def test_majority_counts_equal_answers_together():
    assert majority(boxed("1/2", "3", "0.5", "3", "\\frac12"), verify.judge) == "1/2"
    assert majority([*boxed("3", "4"), "no box"], verify.judge) == "3", "of a tie, the first"
    assert majority(["no box", ""], verify.judge) is None


def test_solvable_drops_golds_that_no_majority_confirms():
    documents = [prompt(id, "q", "0.5") for id in ("right", "other", "none", "untried")]
    completions = {"right": boxed("1/2", "3", "1/2"), "other": boxed("3", "3", "0.5"), "none": ["I give up"]}
    drops = Drops()
    assert ids(solvable(documents, completions, verify.judge, drops)) == ["right", "untried"]
    assert drops.counts == {"majority vote is another answer": 1, "no completion has an answer": 1}


def test_difficulty_is_a_half_open_range_of_pass_rates():
    rates = {"never": PassRate(0, 16), "hard": PassRate(6, 16), "easy": PassRate(7, 16), "odd": PassRate(0, 0)}
    documents, drops = [prompt(id, "q", "1") for id in ("never", "hard", "easy", "odd", "new")], Drops()
    assert ids(by_difficulty(documents, rates, drops, above=0, at_most=6 / 16)) == ["hard", "odd", "new"]
    assert drops.counts == {"pass rate at most 0": 1, "pass rate above 0.375": 1}


def test_the_next_epoch_leaves_solved_prompts_out():
    rates = {"a": PassRate(8, 8), "b": PassRate(7, 8), "c": PassRate(0, 0)}
    assert unsolved(["d", "c", "b", "a"], rates) == ["d", "c", "b"]
    assert unsolved(["d", "c", "b", "a"], rates, solved_at=7 / 8) == ["d", "c"]
    assert unsolved(["a"], rates) == []
