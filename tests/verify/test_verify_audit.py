"""The audit finds verifiers and prompts whose verdicts cannot be trusted."""

import json

import pytest

from bloomery.verify import Pool, audit
from bloomery.verify.audit import UNUSABLE, Case, Item, canaries, measure

NUMBER = Item("n", "s", "What is $2+3$?", "5", "answer")


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=1) as pool:
        yield pool


def kinds(item: Item) -> dict[str, tuple[str, bool]]:
    return {case.kind: (case.completion, case.right) for case in canaries(item)}


def test_a_number_has_canaries_of_every_kind():
    assert kinds(NUMBER) == {
        "empty": ("", False), "empty box": ("\\boxed{}", False), "gold echo": ("\\boxed{5}", True),
        "two boxes": ("\\boxed{5} or \\boxed{6}", False), "question echo": ("\\boxed{What is $2+3$?}", False),
        "formula echo": ("\\boxed{2+3}", False), "as a fraction": ("\\boxed{\\frac{5}{1}}", True),
        "one off": ("\\boxed{\\frac{6}{1}}", False),
        "spaced gold": ("<think>so</think>It is $\\boxed{ 5 }$.", True),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (NUMBER, {"correct": 3, "no_answer": 2, "multi_box": 1, "wrong": 3}),
        (Item("a", "s", "Which?", "\\frac{x}{2}", "answer"), {"correct": 3, "no_answer": 2, "multi_box": 1}),
        (Item("b", "s", "Which, A or B?", "B) fig", "choice"), {"correct": 2, "no_answer": 2, "multi_box": 1}),
        (Item("c", "s", "Who?", "Ann", "exact"), {"correct": 2, "no_answer": 2, "multi_box": 1}),
        (Item("d", "s", "q", "", "format"), {"no_answer": 2}),
    ],
    ids=lambda value: getattr(value, "verifier", ""),
)  # fmt: skip
def test_sound_prompts_have_no_wrong_verdict(pool: Pool, item: Item, expected: dict[str, int]):
    measured = measure(canaries(item), pool)
    assert measured.wrong == []
    counts = sum(measured.sources["s"].statuses.values(), start=audit.Counter())
    assert {status: counts[status] for status in expected} == expected
    assert measured.sources["s"].rates()["error"] == 0


def test_a_gold_that_nothing_matches_is_a_false_negative(pool: Pool):
    items = [NUMBER, Item("t", "s", "q", "9^{9^{9^{9}}}", "answer"), Item("e", "s", "q", " ", "answer")]
    items.append(Item("g", "s", "q", "no json", "gym"))
    measured = measure((case for item in items for case in canaries(item)), pool)
    rates = measured.sources["s"].rates()
    assert (rates["false_negative"], rates["false_positive"], rates["error"]) == (0.75, 0.0, 0.75)
    assert rates["statuses"]["gold echo"] == {"correct": 1, "parse_fail": 1, UNUSABLE: 2}


def test_a_question_that_answers_itself_is_a_false_positive(pool: Pool):
    measured = measure(canaries(Item("r", "s", "Simplify $\\sqrt{192}$.", "8\\sqrt{3}", "answer")), pool)
    rates = measured.sources["s"].rates()
    assert (rates["false_negative"], rates["false_positive"]) == (0.0, 1.0)
    assert {wrong.kind for wrong in measured.wrong} == {"question echo", "formula echo"}
    assert {wrong.expected for wrong in measured.wrong} == {"not correct"}


def test_what_could_not_be_judged_is_counted_apart():
    class Broken:
        def submit(self, *_):
            future = audit.__dict__["ThreadPoolExecutor"](1)
            return future.submit(lambda: audit.Verdict.of("infra_error"))

    measured = measure(canaries(NUMBER), Broken())
    assert measured.wrong == []
    assert measured.sources["s"].rates()["unjudged"] == 9


def test_the_worst_prompts_come_first(pool: Pool):
    good, bad = Item("good", "s", "q", "5", "answer"), Item("bad", "s", "q", "6", "answer")
    cases = [Case(good, "rollout", "\\boxed{5}", False)] + [Case(bad, "rollout", "\\boxed{6}", False)] * 2
    report = measure(cases, pool).report(2)
    assert [wrong["id"] for wrong in report["worst"]] == ["bad", "bad"]
    assert report["sources"]["s"]["differing"] == 1.0
    assert set(report["seconds"]) == {"p50", "p99", "max"}
    json.dumps(report)


def test_nothing_to_measure(pool: Pool):
    assert measure([], pool).report(3) == {"sources": {}, "seconds": {"max": 0.0}, "worst": []}
