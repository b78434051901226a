"""Completions whose verdict is known, to find a broken verifier before it makes every reward zero."""

import json
from collections.abc import Iterable

from bloomery.errors import BloomeryError
from bloomery.verify import choice, short
from bloomery.verify.pool import judge
from bloomery.verify.verdict import Status
from bloomery.verify.verifiers import VERIFIERS, lookup

_DOUBLE = json.dumps({
    "kind": "call", "fn_name": "f", "cases": [{"args": [2], "ret": 4}, {"args": [-3], "ret": -6}],
    "reference": "def f(x):\n    return 2 * x\n",
})  # fmt: skip
_GCD = json.dumps({"dataset": "gcd", "config": {}, "entry": {"question": "", "answer": "6", "metadata": {}}})


def _fenced(source: str) -> str:
    return f"```python\n{source}```"


CANARIES: dict[str, tuple[tuple[str, str, Status], ...]] = {
    "answer": (
        (r"\boxed{1081}", "1081", "correct"),
        (r"\boxed{23\cdot 47}", "1081", "wrong"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", "correct"),
        (r"\boxed{(x+2)^2}", "x^2+2x+1", "wrong"),
        ("", "1081", "no_answer"),
    ),
    "choice": ((r"\boxed{B}", "B", "correct"), (r"\boxed{A or B}", "B", "wrong"), ("", "B", "no_answer")),
    "exact": ((r"\boxed{Ann}", "Ann", "correct"), (r"\boxed{Ann or Bob}", "Ann", "wrong"), ("", "Ann", "no_answer")),
    "format": ((r"\boxed{1}", "", "correct"), (r"\boxed{1} and", "", "wrong"), ("", "", "no_answer")),
    "label": (
        (r"\boxed{(B)}", "B", "correct"),
        (r"\boxed{A or B}", "B", "wrong"),
        (r"\boxed{ABCD}", '{"label": "B", "options": 4}', "wrong"),
        ("", "B", "no_answer"),
    ),
    "program": (
        (_fenced("def f(x):\n    return x + x\n"), _DOUBLE, "correct"),
        (_fenced("def f(x):\n    return x * x\n"), _DOUBLE, "wrong"),
        (_fenced("class Right:\n    __eq__ = lambda *_: True\ndef f(x):\n    return Right()\n"), _DOUBLE, "wrong"),
        ("", _DOUBLE, "no_answer"),
    ),
    "short": (
        (r"\boxed{the Eiffel Tower.}", "Eiffel tower", "correct"),
        (r"\boxed{twelve kg}", "12 kilograms", "correct"),
        (r"\boxed{Paris, Rome or Bonn}", "Rome", "wrong"),
        ("", "Rome", "no_answer"),
    ),
    "gym": ((r"\boxed{6}", _GCD, "correct"), (r"\boxed{6 or 66}", _GCD, "wrong"), ("", _GCD, "no_answer")),
}
"""Verifier → (completion, answer, expected status)."""


def self_test(verifiers: Iterable[str] = tuple(VERIFIERS)) -> None:
    """Judge the canaries; raises `BloomeryError` naming the first that comes out otherwise.

    For the start of RL and of evaluation. `gym` costs the import of reasoning-gym, so name only what is used.
    """
    for verifier in verifiers:
        lookup(verifier)
        for completion, answer, expected in CANARIES[verifier]:
            verdict = judge(verifier, completion, answer)
            if verdict.status == "timeout":  # a busy machine is no broken verifier
                verdict = judge(verifier, completion, answer)
            if verdict.status != expected:
                raise BloomeryError(
                    f"verify: {verifier} judges {completion!r} against {answer!r} as {verdict.status} "
                    f"({verdict.reason}), expected {expected}; check the installation of math-verify and reasoning-gym"
                )


def has_echo(verifier: str, answer: str) -> bool:
    """Whether a prompt's answer column holds a whole answer: `format` has none, a program's tests may lack one."""
    return verifier != "format" and (verifier != "program" or "reference" in json.loads(answer))


def echo(verifier: str, answer: str) -> str:
    """A completion that states a prompt's answer and nothing else.

    Judging it must give `correct`; a prompt where it does not can reward nothing and is to be dropped.
    """
    if verifier == "program":
        return _fenced(json.loads(answer).get("reference", ""))
    return rf"\boxed{{{stated(verifier, answer)}}}"


def stated(verifier: str, answer: str) -> str:
    """The gold answer as a model would write it, where the column `answer` holds more."""
    if verifier == "gym":
        return json.loads(answer)["entry"]["answer"]
    if verifier == "label":
        return choice.read_gold(answer).label
    return short.read_gold(answer).texts[0] if verifier == "short" else answer
