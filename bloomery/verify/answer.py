r"""Mathematical answers: is the boxed answer the gold answer?

A gold number is compared here, exactly. Everything else goes to math-verify in a worker process, after a guard that
keeps expressions out which would cost seconds. The rules are those of the AceReason verifier (arXiv 2505.16400)
hardened: symbolic equivalence alone would pay for `\boxed{23\cdot 47}` where 1081 is asked.
"""

import re

from bloomery.errors import ArtifactError
from bloomery.verify.deferred import Deferred
from bloomery.verify.extract import boxed_answer
from bloomery.verify.numbers import read_number
from bloomery.verify.verdict import Verdict

MAX_CHARS, MAX_NESTING, MAX_DIGITS, MAX_EXPONENT_DIGITS = 256, 30, 40, 4

_LONG_LITERAL = re.compile(rf"\d{{{MAX_DIGITS + 1},}}")
_BIG_EXPONENT = re.compile(rf"\^\s*\{{?\s*[+-]?\s*\d{{{MAX_EXPONENT_DIGITS + 1},}}")
_TOWER = re.compile(r"\^\s*(?:\w\s*\^|\{[^}]*\^|\{[^{}]*\}\s*\^)")
_POWER_OF_LETTER = re.compile(
    r"(\\?[A-Za-z]+)\s*\^\s*(?:\d|\{\s*\d{1,2}\s*\})(?!\s*\^)"
)  # x^{2} in e^{-x^{2}} is small
_FACTORIAL = re.compile(r"\d{5,}\s*!|!\s*!")
_FACTORIAL_OF_GROUP = re.compile(r"[)}]\s*!")
_FACTOR_SIGN = re.compile(r"(?:\\cdot|\\times|\*)\s*(?=\\sqrt|\\pi)")  # 2\cdot\sqrt{3} is evaluated
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?")
_OPERATION = re.compile(r"\\[A-Za-z]+|[+*^!]")
_BINARY_MINUS = re.compile(r"((?:[\d})\]!]|\\pi)\s*)-")  # a sum like any other: \sqrt{5}-1 is -1+\sqrt{5}
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|textrm|mbox|operatorname)\s*\{[^{}]*\}")
_HARMLESS = frozenset({
    r"\frac", r"\dfrac", r"\tfrac", r"\sqrt", r"\pi", r"\infty", r"\pm", r"\mp", r"\left", r"\right", r"\cup", r"\cap",
    r"\in", r"\le", r"\ge", r"\leq", r"\geq", r"\lt", r"\gt", r"\emptyset", r"\varnothing", r"\circ", r"\degree",
    r"\text", r"\mathrm", r"\textbf", r"\textrm", r"\mbox", r"\quad", r"\qquad", r"\begin", r"\end",
})  # fmt: skip


def answer(completion: str, gold: str, require_think: bool = False) -> Verdict | Deferred:
    """The verdict on a mathematical answer, or the work left for a worker. Raises `ArtifactError` on an empty gold."""
    if not gold.strip():
        raise ArtifactError(
            "a prompt with verifier 'answer' has an empty answer; drop such rows when preparing the data"
        )
    found = boxed_answer(completion, require_think)
    if isinstance(found, Verdict):
        return found
    target = read_number(gold)
    if target is not None:
        number = read_number(found)
        if number is None:
            return Verdict.of("wrong", f"not a written-out number: {found[:80]}")
        return Verdict.of("correct") if target.equals(number) else Verdict.of("wrong", f"{found[:80]} is not {gold}")
    if reason := too_costly(found):
        return Verdict.of("parse_fail", reason)
    if extra := unevaluated(found, gold):
        return Verdict.of("wrong", f"not evaluated: {extra} stands in the answer and not in the gold answer")
    return Deferred("math", {"gold": gold, "found": found})


def too_costly(text: str) -> str | None:
    """Why an expression is not given to the parser, or `None`. Measured: each of these burns seconds in math-verify."""
    if len(text) > MAX_CHARS:
        return f"{len(text)} characters, at most {MAX_CHARS}"
    if "\0" in text:
        return "a NUL character"
    if (depth := _nesting(text)) > MAX_NESTING:
        return f"{depth} nested groups, at most {MAX_NESTING}"
    if _LONG_LITERAL.search(text):
        return f"a number of more than {MAX_DIGITS} digits"
    if _BIG_EXPONENT.search(text) or _TOWER.search(_POWER_OF_LETTER.sub(r"\1", text)):
        return "a power too large to evaluate"
    if _FACTORIAL.search(text) or (_FACTORIAL_OF_GROUP.search(text) and not _has_variables(text)):
        return "a factorial too large to evaluate"
    return None


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def unevaluated(found: str, gold: str) -> str | None:
    r"""An operation that `found` still asks for and a gold without variables does not, such as `\cdot` or `\gcd`."""
    if _has_variables(gold):
        return None  # another form of the same expression is a fair answer
    extra = set(_operations(found)) - set(_operations(gold)) - _HARMLESS
    return min(extra, default=None)


def _has_variables(text: str) -> bool:
    return re.search(r"[A-Za-z]", _COMMAND.sub("", _WORDS.sub("", text))) is not None


def _operations(text: str) -> list[str]:
    return _OPERATION.findall(_BINARY_MINUS.sub(r"\1+", _FACTOR_SIGN.sub("", _DEGREES.sub("", text))))
