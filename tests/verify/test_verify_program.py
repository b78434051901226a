"""Programs against hidden tests: what passes, what does not, and how outputs are compared."""

import json
import os
import shutil
from decimal import Decimal
from pathlib import Path

import pytest

from bloomery import verify
from bloomery.data import procedural
from bloomery.errors import ArtifactError
from bloomery.verify import Deferred, program
from bloomery.verify.program import same_text, same_value, score

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
DOUBLE = json.dumps({"kind": "call", "fn_name": "f", "cases": [{"args": [2], "ret": 4}, {"args": [5], "ret": 10}]})
SUM = json.dumps({
    "kind": "stdin", "cases": [{"in": "1 2\n", "out": "3\n"}, {"in": "10 -4\n", "out": "6"}], "time_limit_s": 0.5,
})  # fmt: skip


def fenced(source: str) -> str:
    return f"<think>hm</think>So:\n```python\n{source}\n```\n"


@needs_bwrap
@pytest.mark.parametrize(
    ("tests", "source", "status", "reason"),
    [
        (DOUBLE, "def f(x):\n    return 2 * x", "correct", ""),
        (DOUBLE, "def f(x):\n    return x * x", "wrong", "case 2 of 2: gave b'25'"),
        (DOUBLE, "def f(x):\n    return 1 / 0", "wrong", "ZeroDivisionError"),
        (DOUBLE, "def g(x):\n    return 2 * x", "wrong", "no function 'f'"),
        (DOUBLE, "import sys\nsys.exit(0)", "wrong", "ended with an error"),
        (DOUBLE, "class T(int):\n    __eq__ = lambda *a: True\ndef f(x):\n    return T(x)", "wrong", "a T cannot"),
        (SUM, "a, b = map(int, input().split())\nprint(a + b)", "correct", ""),
        (SUM, "print(3)", "wrong", "case 2 of 2: gave b'3"),
        (SUM, "while True:\n    pass", "timeout", "used more processor time"),
        (SUM, "while True:\n    print('x' * 999)", "wrong", ""),
        (SUM, "import threading, sys\nsys.setrecursionlimit(9999)\nthreading.stack_size(1 << 26)\n"
              "def main():\n    print(sum(map(int, input().split())))\nt = threading.Thread(target=main)\nt.start()",
         "correct", ""),
    ],
)  # fmt: skip
def test_verdicts(tests, source, status, reason):
    verdict = score(tests, source)
    assert verdict.status == status
    assert reason in verdict.reason


@needs_bwrap
def test_through_the_pool_in_a_worker():
    with verify.Pool(workers=2) as pool:
        right, wrong = "def f(x):\n    return x + x", "def f(x):\n    return 4"
        verdicts = pool.judge_all([("program", fenced(right), DOUBLE), ("program", fenced(wrong), DOUBLE)] * 3)
    assert [verdict.status for verdict in verdicts] == ["correct", "wrong"] * 3


@needs_bwrap
def test_the_case_that_fails_most_runs_first():
    tests = json.dumps({"kind": "call", "fn_name": "f", "cases": [{"args": [n], "ret": n} for n in range(3)]})
    assert score(tests, "def f(x):\n    return x if x < 2 else -1").reason.startswith("case 3 of 3")
    assert score(tests, "def f(x):\n    return -1").reason.startswith("case 3 of 3")


@needs_bwrap
def test_echoes_of_generated_problems_are_right():
    problems = list(procedural.generate("program", seed=3, count=12))
    with verify.Pool(workers=1) as pool:
        items = [
            (problem.verifier, verify.echo(problem.verifier, problem.answer), problem.answer) for problem in problems
        ]
        assert all(verdict.correct for verdict in pool.judge_all(items))
        wrong = [(p.verifier, fenced("def f(*a):\n    return None"), p.answer) for p in problems]
        assert not any(verdict.correct for verdict in pool.judge_all(wrong))


def test_a_missing_sandbox_is_refusal_and_no_verdict(monkeypatch):
    from bloomery.errors import SandboxError

    monkeypatch.setenv("PATH", "/nonexistent")
    with verify.Pool(workers=1) as pool, pytest.raises(SandboxError, match="bwrap is not installed"):
        pool.judge_all([("program", fenced("def f(x):\n    return 4"), DOUBLE)])


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("def f(x): return 2 * x", "no_answer"),
        ("<think>```python\ndef f(x): return 2\n```", "no_think"),
        ("```python\ndef f(x): return 2", "no_answer"),
        ("```python\n" + "#" * 200_000 + "\n```", "parse_fail"),
        ("```c\nint f;\n```", "no_answer"),
    ],
)
def test_completions_without_a_program(completion, status):
    assert program.program(completion, DOUBLE).status == status


def test_the_last_fence_after_the_thinking_counts():
    text = "```python\nfirst\n```</think>```py\nsecond\n```\n```python\r\nthird\n```"
    work = program.program(text, DOUBLE)
    assert isinstance(work, Deferred)
    assert work.arguments["source"] == "third\n"


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("no json", "expected JSON with kind stdin or call"),
        ("{}", "KeyError: 'kind'"),
        ('{"kind": "call", "fn_name": "f", "cases": []}', "every program would pass"),
        ('{"kind": "stdin", "cases": [{"in": ""}]}', "KeyError: 'out'"),
        ('{"kind": "stdin", "checker": "eq", "cases": [{"in": "", "out": ""}]}', "expected tokens, exact or float"),
    ],
)
def test_tests_that_cannot_be_used(tests, message):
    with pytest.raises(ArtifactError, match=message):
        program.program(fenced("x"), tests)


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (1, 1.0, True), (True, 1, False), ([1, [2]], [1, [2]], True), ([1], [1, 2], False), ("1", 1, False),
        ({"dict": [["a", 1]]}, {"dict": [["a", 1]]}, True), ({"set": [1]}, {"dict": [1]}, False), (None, 0, False),
        (float("nan"), float("nan"), True), (2**63, 2**63, True),
    ],
)  # fmt: skip
def test_equal_values(found, expected, same):
    assert same_value(found, expected) is same


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("1 2 \n\n", "1 2", True), ("1\n2", "1 2", False), ("1.0", "1", True), ("1e3", "1000", True),
        ("a  b", "a b", True),
        ("50000000000000000", "50000000000000001", False), ("A", "a", False), ("", "0", False), (" 1", "1", True),
        ("nan", "nan", True), ("inf", "1", False),
    ],
)  # fmt: skip
def test_equal_texts(found, expected, same):
    assert same_text(found, expected) is same


def test_a_tolerance_is_exact():
    assert same_text("0.1000001", "0.1", Decimal("1e-6"))
    assert not same_text("0.100002", "0.1", Decimal("1e-6"))


PASSES = json.dumps({"kind": "stdin", "cases": [{"in": "", "out": "passed"}]})
MBPP = Path(os.environ.get("BLOOMERY_DATA", Path(__file__).parents[3] / "shared" / "data"), "code", "mbpp.jsonl")


@needs_bwrap
@pytest.mark.slow
@pytest.mark.skipif(not MBPP.is_file(), reason="the MBPP file is not here (BLOOMERY_DATA)")
def test_every_reference_solution_passes_and_mutants_fail():
    """Mutants of the 974 solutions differ in one operator or constant. Where one breaks an assertion of its problem,
    run as a script, the verifier must have found it wrong: 99 of 100 at least."""
    from mbpp import mutants, problems

    solved = list(problems(MBPP))
    assert len(solved) == 974
    with verify.Pool(workers=2) as pool:
        verdicts = pool.judge_all([("program", fenced(each.source), each.tests) for each in solved])
        assert [each.task for each, verdict in zip(solved, verdicts, strict=True) if not verdict.correct] == []
        changed = [(each, mutant) for each in solved for mutant in mutants(each.source)]
        judged = pool.judge_all([("program", fenced(mutant), each.tests) for each, mutant in changed])
        scripts = pool.judge_all([("program", fenced(each.script(mutant)), PASSES) for each, mutant in changed])
    broken = [verdict for verdict, script in zip(judged, scripts, strict=True) if not script.correct]
    assert len(broken) > 500
    assert sum(not verdict.correct for verdict in broken) / len(broken) >= 0.99
    harmless = [verdict for verdict, script in zip(judged, scripts, strict=True) if script.correct]
    assert sum(verdict.correct for verdict in harmless) / len(harmless) >= 0.99
