"""math-verify behind one function. Runs in worker processes only: it can hang, and it is slow to import."""

from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from bloomery.verify.tex import brace_arguments
from bloomery.verify.verdict import Verdict

# Gold answers may be repaired, predictions may not: a repair would pay for malformed answers.
_NORMALIZE = {"basic_latex": True, "units": True, "nits": True, "boxed": "all", "equations": False}
_GOLD = LatexExtractionConfig(
    boxed_match_priority=0, normalization_config=NormalizationConfig(**_NORMALIZE, malformed_operators=True)
)
_FOUND = LatexExtractionConfig(
    boxed_match_priority=0, normalization_config=NormalizationConfig(**_NORMALIZE, malformed_operators=False)
)


def math(gold: str, found: str) -> Verdict:
    """Is `found` equivalent to `gold`? The order matters: a gold interval may be answered by an inequality only.

    No library timeout is set: the worker runs under its own alarm and the parent's deadline.
    """
    prediction = _parse(found, _FOUND)
    if verify(list(_gold(gold)), prediction, float_rounding=6, numeric_precision=15, strict=True, timeout_seconds=None):
        return Verdict.of("correct")
    if not any(not isinstance(item, str) for item in prediction):
        return Verdict.of("parse_fail", f"not a mathematical expression: {found[:80]}")
    return Verdict.of("wrong", f"{found[:80]} is not {gold[:80]}")


@lru_cache(maxsize=1024)
def _gold(text: str) -> tuple[Any, ...]:
    return tuple(_parse(text, _GOLD))


def _parse(text: str, config: LatexExtractionConfig) -> list[Any]:
    """Expressions first, then the text itself: what no parser reads can still be equal letter by letter."""
    found = parse(rf"\boxed{{{brace_arguments(text)}}}", [config], fallback_mode="first_match", parsing_timeout=None)
    return [_named(item) for item in found]


def _named(item: Any) -> Any:
    """`I = 2t` names a quantity. Read as the imaginary unit it is false, and all false equations are equal."""
    if isinstance(item, sympy.core.relational.Relational) and item.lhs in (sympy.I, sympy.E):
        return item.func(sympy.Symbol(str(item.lhs)), item.rhs, evaluate=False)
    return item
