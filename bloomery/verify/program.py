"""Does a program pass all its tests? It runs in the sandbox; what it gives is compared here, where the answers are.

The tests are JSON: `{"kind": "stdin", "cases": [{"in": text, "out": text}, ...]}` or `{"kind": "call", "fn_name": name,
"cases": [{"args": [...], "ret": value}, ...]}`; a case of the second kind may be `{"call": expression, "returns":
literal}` in Python's own notation, for arguments and values that JSON lacks. Optional: `time_limit_s` (processor
seconds a case), `mem_mb`, `checker` (`tokens`, `exact` or `float:TOLERANCE`), `reference` (a solution that passes).
"""

import ast
import atexit
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from bloomery.errors import ArtifactError
from bloomery.verify.deferred import Deferred
from bloomery.verify.extract import after_thinking
from bloomery.verify.sandbox import CaseRun, Limits, Sandbox
from bloomery.verify.sandbox.plain import plain
from bloomery.verify.verdict import Status, Verdict

MAX_CHARS = 100_000
_FENCE = re.compile(r"```(?:python|py|python3)[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
_DEFAULT_SECONDS, _DEFAULT_MEGABYTES = 6.0, 512
_REASONS = {
    "error": "ended with an error", "cpu": "used more processor time than allowed", "wall": "did nothing for long",
    "output": "wrote more than is read",
}  # fmt: skip


def program(completion: str, tests: str, require_think: bool = False) -> Verdict | Deferred:
    """The last python fence after the thinking, to be run by a worker."""
    suite = _tests(tests)
    text = after_thinking(completion, require_think)
    if isinstance(text, Verdict):
        return text
    fences = _FENCE.findall(text)
    if not fences:
        return Verdict.of("no_answer", "no ```python fence")
    if len(fences[-1]) > MAX_CHARS:
        return Verdict.of("parse_fail", f"{len(fences[-1])} characters, at most {MAX_CHARS}")
    return Deferred("program", {"tests": tests, "source": fences[-1]}, suite.seconds)


def score(tests: str, source: str) -> Verdict:
    """The worker's half: every case must pass; the first that fails ends it, so those that fail most run first."""
    suite = _tests(tests)
    limits = Limits(suite.cpu_seconds, suite.memory_bytes)
    with _sandbox().program(source, suite.function, limits) as run:
        for number in sorted(range(len(suite.cases)), key=lambda n: -suite.kills[n]):
            case = suite.cases[number]
            verdict = _judge(case, run(case.given))
            if verdict is not None:
                suite.kills[number] += 1
                return Verdict.of(verdict.status, f"case {number + 1} of {len(suite.cases)}: {verdict.reason}")
    return Verdict.of("correct")


def _judge(case: "Case", result: CaseRun) -> Verdict | None:
    """The verdict that ends a program, or `None` when the case passed."""
    if result.outcome != "done":
        status: Status = "timeout" if result.outcome in ("cpu", "wall") else "wrong"
        return Verdict.of(status, f"{_REASONS[result.outcome]} {result.reason.strip()[-200:]}".strip())
    return None if case.passes(result.output) else Verdict.of("wrong", f"gave {result.output[:80]!r}")


@dataclass(frozen=True)
class Case:
    """One test: what the program is given, and whether an output passes."""

    given: bytes
    passes: Callable[[bytes], bool]


@dataclass(frozen=True)
class Tests:
    """All tests of a problem. `kills` counts the programs that each case has caught in this process."""

    function: str | None
    cases: list[Case]
    cpu_seconds: float
    memory_bytes: int
    kills: Counter[int] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """Longest that an honest verdict takes: every case at its limit on a busy machine, the sandbox's start."""
        return 60 + len(self.cases) * self.cpu_seconds + Limits(self.cpu_seconds).patience_seconds


@lru_cache(maxsize=4096)
def _tests(text: str) -> Tests:
    try:
        record = json.loads(text)
        call = {"call": True, "stdin": False}[record["kind"]]
        cases = [
            _call_case(case) if call else _text_case(case, record.get("checker", "tokens")) for case in record["cases"]
        ]
        function = record["fn_name"] if call else None
        limits = float(record.get("time_limit_s", _DEFAULT_SECONDS)), int(record.get("mem_mb", _DEFAULT_MEGABYTES))
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        raise ArtifactError(
            f"a prompt with verifier 'program' has the tests {text[:120]!r}: {type(error).__name__}: {error}; expected "
            "JSON with kind stdin or call, and cases"
        ) from None
    if not cases:
        raise ArtifactError("a prompt with verifier 'program' has no cases; every program would pass")
    return Tests(function, cases, limits[0], limits[1] << 20)


def _call_case(case: dict[str, Any]) -> Case:
    if "call" in case:  # in Python's notation, and by Python's own equality
        expected = plain(ast.literal_eval(case["returns"]))
        return Case(json.dumps(case["call"]).encode(), lambda output: bool(json.loads(output) == expected))
    wanted = plain(case["ret"])
    return Case(json.dumps(case["args"]).encode(), lambda output: same_value(json.loads(output), wanted))


def _text_case(case: dict[str, Any], checker: str) -> Case:
    expected: str = case["out"]
    compare = _checker(checker)
    return Case(case["in"].encode(), lambda output: compare(output.decode(errors="replace"), expected))


def _checker(name: str) -> Callable[[str, str], bool]:
    if name == "exact":
        return lambda found, expected: found == expected
    if name == "tokens":
        return same_text
    kind, _, tolerance = name.partition(":")
    if kind != "float":
        raise ValueError(f"checker {name!r}; expected tokens, exact or float:TOLERANCE")
    return lambda found, expected: same_text(found, expected, Decimal(tolerance))


def same_value(found: Any, expected: Any) -> bool:
    """Equal values in plain form; a truth value is no number."""
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same_value, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same_value(found[key], expected[key]) for key in found)
    if isinstance(found, bool) != isinstance(expected, bool):
        return False
    return bool(found == expected) or (found != found and expected != expected and type(found) is type(expected))


def same_text(found: str, expected: str, tolerance: Decimal = Decimal(0)) -> bool:
    """Equal lines up to spaces at their ends and empty lines at the end; where lines differ, equal tokens, as exact
    decimal numbers (binary floats would call 50000000000000000 and 50000000000000001 equal)."""
    mine, theirs = _lines(found), _lines(expected)
    if mine == theirs:
        return True
    if len(mine) != len(theirs):
        return False
    return all(_same_line(a.split(), b.split(), tolerance) for a, b in zip(mine, theirs, strict=True))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same_line(found: list[str], expected: list[str], tolerance: Decimal) -> bool:
    return len(found) == len(expected) and all(
        _same_token(*pair, tolerance) for pair in zip(found, expected, strict=True)
    )


def _same_token(found: str, expected: str, tolerance: Decimal) -> bool:
    if found == expected:
        return True
    try:
        return abs(Decimal(found) - Decimal(expected)) <= tolerance
    except InvalidOperation:
        return False


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    sandbox = Sandbox()
    atexit.register(sandbox.close)
    return sandbox
