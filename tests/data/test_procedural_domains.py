"""The domains beside arithmetic: every answer is found again by searching or by counting, and a few by hand."""

import datetime
import itertools
import re

import pytest

from bloomery.data.procedural import Problem, generate


def draw(task: str, count: int = 300, seed: int = 0, **rest) -> list[Problem]:
    return list(generate(task, seed=seed, count=count, style={"stepwise": 1}, **rest))


def split_question(problem: Problem) -> tuple[list[str], str]:
    facts, asked = problem.question.split("\n")
    return facts.removesuffix(".").split(". "), asked.removesuffix("?")


@pytest.mark.parametrize("options", [{}, {"people": 3, "deeds": 3}])
def test_verdicts_follow_from_rules_and_deeds(options: dict):
    answers = set()
    for problem in draw("verdict", **options):
        facts, asked = split_question(problem)
        rules = dict(fact.split() for fact in facts[:4])
        deeds = {name: did for name, *did in (fact.split() for fact in facts[4:])}
        kind, name = asked.split()
        ranks = sorted(("free", "warn", "fine", "jail").index(rules[deed]) for deed in deeds[name])
        assert problem.answer == ("free", "warn", "fine", "jail")[ranks[-1] if kind == "hard" else ranks[0]]
        assert len(deeds) == options.get("people", 2)
        answers.add(problem.answer)
    assert len(answers) == 4


def test_knights_have_one_solution_and_it_is_the_answer():
    """Oracle: all four cases, with the sentences read anew."""
    counts = dict.fromkeys(("none", "first", "second", "both"), 0)
    for problem in draw("knights"):
        facts, _ = split_question(problem)
        (one, first), (two, second) = (fact.split(": ") for fact in facts)
        fitting = []
        for lies_one, lies_two in itertools.product((False, True), repeat=2):
            lies = {one: lies_one, two: lies_two}
            if all(true_in(said, lies) != lies[who] for who, said in ((one, first), (two, second))):
                fitting.append(lies)
        [lies] = fitting
        who = [name for name in (one, two) if lies[name]]
        assert problem.answer == ("both" if len(who) == 2 else who[0] if who else "none")
        counts[{one: "first", two: "second"}.get(problem.answer, problem.answer)] += 1
    assert min(counts.values()) > 300 / 8, "the four solutions are asked about as often"


def true_in(said: str, lies: dict[str, bool]) -> bool:
    if match := re.fullmatch(r"(\w+) (lies|is true)", said):
        return lies[match[1]] == (match[2] == "lies")
    same = len(set(lies.values())) == 1
    return {"we agree": same, "we differ": not same, "both lie": all(lies.values())}[said]


GENERATION = {"mother": 1, "father": 1, "son": -1, "daughter": -1, "sister": 0, "brother": 0}
ANSWERED = {"grandmother": 2, "grandfather": 2, "aunt": 1, "uncle": 1, "niece": -1, "nephew": -1,
            "grandson": -2, "granddaughter": -2} | GENERATION  # fmt: skip
FEMALE = ("mother", "daughter", "sister", "grandmother", "aunt", "niece", "granddaughter")


def test_families_keep_count_of_generations_and_sex():
    for problem in draw("family", others=2):
        facts, asked = split_question(problem)
        first, third = asked.split(" of ")
        told = {(one, other): word for one, word, _, other in (fact.split() for fact in facts)}
        [second] = [middle for one, middle in told if one == first]
        path = (told[first, second], told[second, third])
        assert ANSWERED[problem.answer] == sum(GENERATION[word] for word in path)
        assert (problem.answer in FEMALE) == (path[0] in FEMALE)
        lineal = all(GENERATION[word] for word in path) or problem.answer in GENERATION
        assert (problem.answer in ("aunt", "uncle", "niece", "nephew")) == (not lineal)
        assert len(told) == 4


@pytest.mark.parametrize("people", [4, 5])
def test_rows_have_one_order_and_it_gives_the_answer(people: int):
    """Oracle: all orders of the people that keep every fact."""
    for problem in draw("order", 100, people=people):
        facts, asked = split_question(problem)
        pairs = [(a, b) if word == "before" else (b, a) for a, word, b in (fact.split() for fact in facts)]
        names = sorted({name for pair in pairs for name in pair})
        [row] = [row for row in itertools.permutations(names) if all(row.index(a) < row.index(b) for a, b in pairs)]
        expected = {"first": row[0], "last": row[-1]}.get(asked) or row[row.index(asked.split()[-1]) + 1]
        assert (problem.answer, len(names)) == (expected, people)


def test_schedules_name_the_course_whose_needs_are_met():
    for problem in draw("schedule", 100):
        facts, _ = split_question(problem)
        *needs, done = facts
        taken = set(done.removeprefix("done ").split())
        pairs = [need.split(" needs ") for need in needs]
        assert [later for later, earlier in pairs if earlier in taken and later not in taken] == [problem.answer]


def test_days_of_the_week_are_those_of_the_calendar():
    """Oracle: datetime, in a year where the told day falls as told."""
    for problem in draw("calendar", max_days=27):
        month, start, day, later = re.fullmatch(r"(\w+) (\d+) is (\w+)\.\n\1 (\d+)\?", problem.question).groups()
        dates = (datetime.date.fromisoformat(f"{year}-{MONTH[month]:02}-{int(start):02}") for year in range(2000, 2029))
        first = next(date for date in dates if date.strftime("%a") == day)
        assert first.replace(day=int(later)).strftime("%a") == problem.answer


MONTH = {datetime.date(2001, number, 1).strftime("%b"): number for number in range(1, 13)}


def test_words_are_sorted_and_text_has_wrong_options():
    for problem in draw("strings", operations=("words",)):
        assert problem.answer.split() == sorted(problem.question.split()[1:])
    for problem in draw("strings", 100, letters="ab", min_length=2, max_length=9, form="choice"):
        options = problem.metadata["options"]
        assert len(set(options)) == 4, "even where a word has one letter only"


def test_somebody_gets_more():
    [problem] = [p for p in draw("table", 2000, questions=("after",)) if p.question.startswith("cups eggs\nAnn ")][:1]
    header, *rows, asked = problem.question.split("\n")
    name, gain, good = re.fullmatch(r"(\w+) gets (\d+) (\w+)\. most \3\?", asked).groups()
    column = {row.split()[0]: int(row.split()[1 + header.split().index(good)]) for row in rows}
    column[name] += int(gain)
    assert problem.answer == max(column, key=column.get)
    assert len(set(column.values())) == len(column)


def test_by_hand():
    assert {p.question: p.answer for p in draw("order", 2, seed=1)} == {
        "Cy after Jo. Bob after Cy. Eve after Bob.\nfirst?": "Jo",
        "Gus after Cy. Jo before Eve. Eve before Cy.\nnext after Jo?": "Eve",
    }
    assert {p.question: p.answer for p in draw("knights", 2, seed=1)} == {
        "Kim: Hal lies. Hal: we agree.\nwho lies?": "Hal",
        "Gus: we differ. Lee: Gus lies.\nwho lies?": "Lee",
    }
