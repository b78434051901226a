"""Generated problems: every answer is recomputed here by other means, every split and seed promise is checked."""

import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bloomery.data import procedural
from bloomery.data.procedural import TASKS, Problem, generate
from bloomery.errors import ConfigError

OWN = [task for task in TASKS if task != "gym"]


def draw(task: str, count: int = 300, seed: int = 0, **rest) -> list[Problem]:
    return list(generate(task, seed=seed, count=count, **rest))


def boxed(problem: Problem) -> str:
    match = re.fullmatch(r"(?:.*\n)?\\boxed\{(.*)\}", problem.solution, re.DOTALL)
    assert match is not None
    return match.group(1)


def calculate(expression: str) -> int:
    """Oracle: Python's own arithmetic on an expression of digits and + - * / ( ) only."""
    assert re.fullmatch(r"[-+*/()\d]+", expression)
    return eval(expression.replace("/", "//"), {"__builtins__": {}})  # noqa: S307 - digits and operators only


@pytest.mark.parametrize("task", OWN)
def test_the_same_arguments_give_the_same_problems(task: str):
    assert draw(task, 50, seed=3) == draw(task, 50, seed=3)
    assert {p.id for p in draw(task, 50, seed=3)} != {p.id for p in draw(task, 50, seed=4)}


@pytest.mark.parametrize("task", OWN)
def test_no_seed_brings_a_test_problem_into_training(task: str):
    test = {p.id: p for p in draw(task, 50, seed=0, split="test")}
    train = {p.id: p for seed in range(3) for p in draw(task, 400, seed=seed)}
    assert not test.keys() & train.keys()
    assert not {p.question for p in test.values()} & {p.question for p in train.values()}


@pytest.mark.parametrize("task", OWN)
def test_problems_of_one_call_are_distinct_and_complete(task: str):
    problems = draw(task)
    assert len(problems) == 300
    assert len({p.id for p in problems}) == len({p.question for p in problems}) == 300
    for problem in problems:
        assert problem.question
        assert problem.answer
        assert problem.domain == TASKS[task].domain
        assert json.loads(json.dumps(problem.metadata)) == problem.metadata
        if problem.verifier != "program":
            assert boxed(problem) == problem.answer


def test_equal_sums_in_another_order_are_one_problem():
    problems = draw("chain", 3000, min_ops=2, max_ops=2, operators="+-")
    signed = [tuple(sorted(re.findall(r"[-+]\d+", "+" + p.question))) for p in problems]
    assert len(set(signed)) == len(signed)


def test_a_chain_is_solved_step_by_step():
    for problem in draw("chain", 2000, style={"stepwise": 1}, min_ops=1, max_ops=4, operators="+-*/"):
        expression = problem.question.removesuffix("=?")
        assert calculate(expression) == int(problem.answer)
        steps = problem.solution.partition("\n")[0].split(";")
        assert len(steps) == problem.metadata["ops"] == len(re.findall(r"(?<=[\d)])[-+*/]", expression))
        for before, after in itertools.pairwise(steps):
            assert re.match(r"-?\d+", after)[0] == before.partition("=")[2], "each step starts from the last result"
        for step in steps:
            left, right = step.split("=")
            assert calculate(left) == int(right)
            assert 0 <= int(right) <= 99
        assert steps[-1].endswith(f"={problem.answer}")


def test_chain_settings_bound_the_numbers():
    options = {"min_operand": 3, "max_operand": 6, "min_result": -5, "max_result": 12, "operators": "+-", "max_ops": 3}
    for problem in draw("chain", 60, **options):
        assert all(3 <= int(number) <= 6 for number in re.findall(r"\d+", problem.question))
        assert -5 <= int(problem.answer) <= 12
    assert any(int(p.answer) < 0 for p in draw("chain", 60, **options))


def test_equations_hold():
    for problem in draw("equation", 500, style={"stepwise": 1}):
        factor, sign, constant, right = re.fullmatch(r"(\d)x([-+])(\d+)=(-?\d+) x=\?", problem.question).groups()
        assert calculate(f"{factor}*{problem.answer}{sign}{constant}") == int(right)
        for step in problem.solution.partition("\n")[0].split(";"):
            left, result = step.split("=")
            assert calculate(left) == int(result)


def test_tables_have_the_answer_they_say():
    for problem in draw("table"):
        header, *rows, question = problem.question.split("\n")
        kind, good = question.removesuffix("?").split()
        place = header.split().index(good) + 1
        column = {row.split()[0]: int(row.split()[place]) for row in rows}
        expected = {
            "most": max(column, key=column.get), "least": min(column, key=column.get),
            "total": str(sum(column.values())),
        }[kind]  # fmt: skip
        assert problem.answer == expected
        assert list(column.values()).count(max(column.values())) == 1, "one answer only"


@pytest.mark.parametrize("hops", [1, 2])
def test_relations_follow_from_the_facts(hops: int):
    for problem in draw("relation", hops=hops):
        facts, question = problem.question.split("\n")
        edges = [re.split(" has | is ", fact) for fact in facts.removesuffix(".").split(". ")]
        graph = dict(edges)
        for start in [left for left, _ in edges if left[0].isupper()]:
            end = graph[graph[start]] if hops == 2 else graph[start]
            if question in (f"{start} has?", f"{start}'s pet is?"):
                assert problem.answer == end
            if question in (f"who has {end}?", f"whose pet is {end}?"):
                assert problem.answer == start


@pytest.mark.parametrize("task", [task for task in OWN if "form" in TASKS[task].options.model_fields])
def test_open_and_multiple_choice_are_twins(task: str):
    opened, lettered = draw(task, form="open"), draw(task, form="choice")
    labels = set()
    for one, other in zip(opened, lettered, strict=True):
        assert one.id.removesuffix("-open") == other.id.removesuffix("-choice")
        assert other.question.startswith(one.question + "\nA) ")
        assert other.verifier == "choice"
        options = dict(re.findall(r"^([A-H])\) (.*)$", other.question, re.MULTILINE))
        assert options[other.answer] == one.answer
        assert len(set(options.values())) == len(options) == len(other.metadata["options"])
        assert len(options) == 4 or task in ("table", "relation")  # there as many as there are people
        labels.add(other.answer)
    assert labels >= {"A", "B", "C"}


def test_strings():
    for problem in draw("strings", 400, style={"stepwise": 1}):
        operation, *words = problem.question.split()
        expected = {
            "reverse": lambda word: "".join(reversed(word)), "sort": lambda word: "".join(sorted(word)),
            "count": lambda letter, _, word: str(sum(seen == letter for seen in word)),
        }[operation](*words)  # fmt: skip
        assert problem.answer == expected
        last = problem.solution.partition("\n")[0].split(";")[-1]
        spelled = last.split("-")
        if operation == "count":
            assert "".join(step[0] for step in spelled) == words[-1]
            assert next(step for step in reversed(spelled) if step[0] == words[0])[1:] == expected
        else:
            assert "".join(spelled) == expected


def test_programs_pass_their_own_hidden_tests():
    problems = draw("program", 200)
    script = []
    for number, problem in enumerate(problems):
        record = json.loads(problem.answer)
        code = re.search(r"```python\n(.*)\n```$", problem.solution, re.DOTALL)[1]
        script.append(
            f"{code}\nfor case in {record['cases']!r}:\n    assert f(*case['args']) == case['ret'], ({number}, case)"
        )
        assert (record["kind"], record["fn_name"], len(record["cases"])) == ("call", "f", 8)
    run = subprocess.run([sys.executable, "-I", "-c", "\n".join(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-500:]


def test_linear_programs_are_tested_where_they_were_not_shown():
    for problem in draw("program", 100, kinds=("linear",)):
        shown = {int(x) for x in re.findall(r"f\((\d+)\)", problem.question)}
        assert len(shown) == 2
        assert not shown & {case["args"][0] for case in json.loads(problem.answer)["cases"]}


def test_style_shares_are_met_and_do_not_change_the_problems():
    mixed = draw("chain", 2000)
    stepwise = sum(p.metadata["style"] == "stepwise" for p in mixed)
    assert 720 <= stepwise <= 880  # 40 % of 2000, four standard errors
    assert all((";" in p.solution) == (p.metadata["style"] == "stepwise") for p in mixed)
    direct = draw("chain", 2000, style={"direct": 1})
    assert [p.id for p in direct] == [p.id for p in mixed]
    assert all(p.solution == rf"\boxed{{{p.answer}}}" for p in direct)


def test_texts_are_short_enough_for_a_tiny_model():
    for problem in draw("chain", 500, style={"stepwise": 1}):
        assert len(problem.question) <= 20
        assert len(problem.solution) <= 40


def test_an_exhausted_space_says_how_much_it_holds():
    options = {"min_ops": 1, "max_ops": 1, "max_operand": 3, "operators": "+"}
    everything = {tuple(sorted(pair)) for pair in itertools.product((1, 2, 3), repeat=2)}
    found = 0
    for split in ("train", "test"):
        with pytest.raises(ConfigError, match=rf"chain: asked for 100 {split} problems, found \d: .*fewer") as raised:
            draw("chain", 100, split=split, **options)
        found += int(re.search(r"found (\d)", str(raised.value))[1])
    assert found == len(everything)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"task": "chains"}, "chains: no such task; did you mean chain?"),
        ({"task": "xyz"}, "xyz: no such task; known: chain, equation"),
        ({"task": "chain", "max_op": 3}, "chain.max_op: unknown key; did you mean max_ops?"),
        ({"task": "chain", "min_ops": 3}, "min_ops is larger than max_ops"),
        ({"task": "chain", "operators": "%"}, "chain.operators"),
        ({"task": "chain", "split": "dev"}, "choose train or test"),
        ({"task": "chain", "style": {"verbose": 1}}, "no style 'verbose'; choose from direct, stepwise"),
        ({"task": "chain", "style": {"direct": 0}}, "expected weights of at least 0 with a positive sum"),
        ({"task": "chain", "style": {"direct": float("nan")}}, "expected weights"),
        ({"task": "gym", "name": "gcd", "style": {"stepwise": 1}}, "no worked steps; use direct only"),
        ({"task": "gym"}, "gym.name: missing"),
        ({"task": "strings", "letters": "aab"}, "letters names a letter twice"),
        ({"task": "table", "form": "essay"}, "table.form"),
    ],
)  # fmt: skip
def test_bad_settings_are_explained_at_the_call(call: dict, message: str):
    with pytest.raises(ConfigError) as raised:
        generate(**{"seed": 0, "count": 1, **call})
    assert message in str(raised.value)


def test_settings_that_allow_no_chain_are_explained():
    with pytest.raises(ConfigError, match=r"no chain of 2 to 2 operations '\*' stays within 0..5"):
        draw("chain", 1, operators="*", min_operand=4, max_operand=9, max_result=5)


def test_the_page_names_every_task_and_setting():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    for task, entry in TASKS.items():
        row = next(line for line in page.split("## Settings")[1].splitlines() if line.startswith(f"| `{task}`"))
        for name, field in entry.options.model_fields.items():
            assert f"`{name}`" in row
            assert (
                isinstance(field.default, tuple)
                or field.is_required()
                or not field.default
                or str(field.default) in row
            )


def test_arithmetic_is_fast():
    start = time.process_time()
    draw("chain", 5000)
    assert 5000 / (time.process_time() - start) > 5000  # 30,000 a second on an idle core


def test_the_package_imports_neither_torch_nor_reasoning_gym():
    code = f"import sys, {procedural.__name__}; print({{'torch', 'reasoning_gym', 'sympy'}} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
