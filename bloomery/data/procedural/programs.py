"""Small Python programs with hidden tests.

`answer` is the test record as JSON: `{"kind": "call", "fn_name": "f", "cases": [{"args": [...], "ret": ...}, ...],
"reference": solution}`. Nothing is executed here: expected values come from the functions below. `linear` is the code
task of the AceReason miniature: it shares its arithmetic with `chain` and nothing else.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from bloomery.config import Config, Field
from bloomery.data.procedural.problem import Draft

Kind = Literal["linear", "numbers", "lists", "strings"]
CASE_SECONDS = 1
_LETTERS = "abcdef"
_LOOP = "    total = 0\n    for i in range({k}, n + 1, {k}):\n        total += i\n    return total"


class ProgramOptions(Config):
    """Settings of `program`."""

    kinds: tuple[Kind, ...] = Field(
        default=("linear", "numbers", "lists", "strings"), min_length=1,
        description="linear: a x + b from two examples; the others: a described function over that type",
    )  # fmt: skip
    max_constant: int = Field(default=20, ge=2, description="largest constant in a program")
    max_slope: int | None = Field(default=None, ge=2, description="linear: largest a; max_constant where not given")
    cases: int = Field(default=8, ge=1, description="hidden tests per problem")


@dataclass(frozen=True)
class _Template:
    """A described function with one constant `k`: its text, its Python body, and the same function to make tests."""

    text: str
    parameter: str
    body: str
    function: Callable[[Any, Any], Any]


def _multiples(n: int, k: int) -> int:
    return sum(i for i in range(1, n + 1) if i % k == 0)


_TEMPLATES: dict[str, tuple[_Template, ...]] = {
    "numbers": (
        _Template("sum of the multiples of {k} from 1 to n", "n", _LOOP, _multiples),
        _Template("n in steps of {k}: how many full steps", "n", "    return n // {k}", lambda n, k: n // k),
        _Template("the larger of n and {k}", "n", "    return n if n > {k} else {k}", max),
        _Template("distance of n from {k}", "n", "    return abs(n - {k})", lambda n, k: abs(n - k)),
    ),
    "lists": (
        _Template("sum of the x in xs above {k}", "xs", "    return sum(x for x in xs if x > {k})",
                  lambda xs, k: sum(x for x in xs if x > k)),
        _Template("how many x in xs {k} divides", "xs", "    return sum(x % {k} == 0 for x in xs)",
                  lambda xs, k: sum(x % k == 0 for x in xs)),
        _Template("each x in xs times {k}", "xs", "    return [{k} * x for x in xs]",
                  lambda xs, k: [k * x for x in xs]),
        _Template("xs without the numbers below {k}", "xs", "    return [x for x in xs if x >= {k}]",
                  lambda xs, k: [x for x in xs if x >= k]),
    ),
    "strings": (
        _Template("s repeated {k} times", "s", "    return s * {k}", lambda s, k: s * k),
        _Template("s backward, {k} times", "s", "    return s[::-1] * {k}", lambda s, k: s[::-1] * k),
        _Template("s with a dash and {k} after it", "s", "    return s + '-{k}'", lambda s, k: f"{s}-{k}"),
        _Template("letters of s plus {k}", "s", "    return len(s) + {k}", lambda s, k: len(s) + k),
    ),
}  # fmt: skip


def programs(options: ProgramOptions, random: Random) -> Iterator[Draft]:
    """Endless programming problems."""
    while True:
        kind = random.choice(options.kinds)
        yield _linear(options, random) if kind == "linear" else _described(kind, options, random)


def _linear(options: ProgramOptions, random: Random) -> Draft:
    slope = random.randint(2, options.max_slope or options.max_constant)
    offset = random.randint(0, options.max_constant)
    low, high = sorted(random.sample(range(1, 10), 2))
    at_low, at_high = slope * low + offset, slope * high + offset
    unseen = [x for x in range(-50, 100) if x not in (low, high)]
    return _draft(
        canonical=f"program linear {slope} {offset}", kind="linear", parameter="x",
        question=f"f({low})={at_low}, f({high})={at_high}, f linear. Write f(x).",
        body=f"    return {slope} * x + {offset}",
        cases=[(x, slope * x + offset) for x in random.sample(unseen, options.cases)],
        steps=(f"{at_high}-{at_low}={at_high - at_low}", f"{high}-{low}={high - low}",
               f"{at_high - at_low}/{high - low}={slope}", f"{slope}*{low}={slope * low}",
               f"{at_low}-{slope * low}={offset}"),
    )  # fmt: skip


def _described(kind: str, options: ProgramOptions, random: Random) -> Draft:
    template, constant = random.choice(_TEMPLATES[kind]), random.randint(2, options.max_constant)
    inputs = [_EDGE_INPUTS[kind], *(_input(kind, options, random) for _ in range(options.cases - 1))]
    text = template.text.format(k=constant)
    return _draft(
        canonical=f"program {text}", kind=kind, parameter=template.parameter,
        question=f"Write f({template.parameter}): {text}.", body=template.body.format(k=constant),
        cases=[(value, template.function(value, constant)) for value in inputs], steps=(),
    )  # fmt: skip


_EDGE_INPUTS: dict[str, Any] = {"numbers": 0, "lists": [], "strings": ""}


def _input(kind: str, options: ProgramOptions, random: Random) -> Any:
    if kind == "numbers":
        return random.randint(1, 5 * options.max_constant)
    if kind == "lists":
        return [random.randint(1, 2 * options.max_constant) for _ in range(random.randint(1, 8))]
    return "".join(random.choices(_LETTERS, k=random.randint(1, 8)))


def _draft(
    canonical: str,
    kind: str,
    parameter: str,
    question: str,
    body: str,
    cases: list[tuple[Any, Any]],
    steps: tuple[str, ...],
) -> Draft:
    source = f"def f({parameter}):\n{body}\n"
    record = {
        "kind": "call", "fn_name": "f", "cases": [{"args": [value], "ret": result} for value, result in cases],
        "time_limit_s": CASE_SECONDS, "reference": source,
    }  # fmt: skip
    return Draft(
        canonical, question, json.dumps(record), "program", steps,
        final=f"```python\n{source}```", metadata={"kind": kind},
    )  # fmt: skip
