"""Arithmetic: chains of operations such as `(12-5)*3+4` and linear equations such as `3x+5=20`.

The two mathematical tasks of the AceReason miniature (arXiv 2505.16400): terse steps, answers from a large space.
"""

from collections.abc import Iterator
from random import Random
from typing import Self

from pydantic import model_validator

from bloomery.config import Config, Field
from bloomery.data.procedural.problem import Draft
from bloomery.errors import ConfigError

_RESTARTS = 1000


class ChainOptions(Config):
    """Settings of `chain`: a value changed by several operations, evaluated from left to right."""

    min_ops: int = Field(default=2, ge=1, description="fewest operations in a chain")
    max_ops: int = Field(default=2, ge=1, description="most operations in a chain")
    operators: str = Field(default="+-*", pattern=r"^[-+*/]+$", description="operators to draw from, out of + - * /")
    min_operand: int = Field(default=1, ge=0, description="smallest first value and smallest number to add or subtract")
    max_operand: int = Field(default=20, ge=1, description="largest first value and largest number to add or subtract")
    max_factor: int = Field(default=9, ge=2, description="largest multiplier or divisor; the smallest is 2")
    min_result: int = Field(default=0, description="smallest value allowed after any operation")
    max_result: int = Field(default=99, description="largest value allowed after any operation")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for low, high in (("min_ops", "max_ops"), ("min_operand", "max_operand"), ("min_result", "max_result")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} is larger than {high}")
        return self


def chains(options: ChainOptions, random: Random) -> Iterator[Draft]:
    """Endless chains. Division is exact; every intermediate value lies in the allowed range."""
    misses = 0
    while True:
        draft = _chain(options, random)
        if draft is not None:
            misses = 0
            yield draft
        elif (misses := misses + 1) == _RESTARTS:
            raise ConfigError(
                f"chain: no chain of {options.min_ops} to {options.max_ops} operations {options.operators!r} stays "
                f"within {options.min_result}..{options.max_result}; widen the results or narrow the operands"
            )


def _chain(options: ChainOptions, random: Random) -> Draft | None:
    count = options.min_ops + int(random.random() * (options.max_ops - options.min_ops + 1))
    value = random.randint(options.min_operand, options.max_operand)
    text, terms, kind = str(value), [str(value)], "+"
    steps: list[str] = []
    for _ in range(count):
        moves = [(op, span) for op in options.operators if (span := _operands(op, value, options))]
        if not moves:
            return None
        operator, span = random.choice(moves)
        operand = random.choice(span)
        family = "+" if operator in "+-" else "*"
        if family != kind and steps:
            terms = [f"({_canonical(terms, kind)})"]
            text = f"({text})" if family == "*" else text
        kind = family
        terms.append(f"{operator}{operand}")
        text += f"{operator}{operand}"
        result = _apply(operator, value, operand)
        steps.append(f"{value}{operator}{operand}={result}")
        value = result
    return Draft(
        canonical=f"chain {_canonical(terms, kind)}", question=f"{text}=?", answer=str(value), verifier="answer",
        steps=tuple(steps), metadata={"ops": count},
    )  # fmt: skip


def _canonical(terms: list[str], kind: str) -> str:
    """Sums and products do not care for order: `3+5-2` is `5-2+3`. The first term comes without its operator."""
    return "".join(sorted([kind + terms[0], *terms[1:]]))


def _operands(operator: str, value: int, options: ChainOptions) -> range | list[int]:
    """The operands that keep `value operator operand` in the allowed range."""
    low, high = options.min_operand, options.max_operand
    if operator == "+":
        return range(max(low, options.min_result - value), min(high, options.max_result - value) + 1)
    if operator == "-":
        return range(max(low, value - options.max_result), min(high, value - options.min_result) + 1)
    if value == 0:
        return []
    if operator == "*":
        limit = options.max_result // value if value > 0 else options.min_result // value
        return range(2, min(options.max_factor, limit) + 1)
    return [factor for factor in range(2, options.max_factor + 1) if value % factor == 0]


def _apply(operator: str, left: int, right: int) -> int:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left // right


class EquationOptions(Config):
    """Settings of `equation`: `a x + b = c` or `a x - b = c` with a whole solution."""

    max_coefficient: int = Field(default=9, ge=2, description="largest factor of x; the smallest is 2")
    min_solution: int = Field(default=0, description="smallest x")
    max_solution: int = Field(default=20, description="largest x")
    max_constant: int = Field(default=20, ge=1, description="largest number added to or taken from the multiple of x")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_solution > self.max_solution:
            raise ValueError("min_solution is larger than max_solution")
        return self


def equations(options: EquationOptions, random: Random) -> Iterator[Draft]:
    """Endless linear equations, solved in two steps: undo the constant, then the factor."""
    while True:
        factor = random.randint(2, options.max_coefficient)
        solution = random.randint(options.min_solution, options.max_solution)
        constant = random.randint(1, options.max_constant)
        sign, inverse = random.choice(("+-", "-+"))
        product = factor * solution
        right = _apply(sign, product, constant)
        text = f"{factor}x{sign}{constant}={right}"
        yield Draft(
            canonical=f"equation {text}", question=f"{text} x=?", answer=str(solution), verifier="answer",
            steps=(f"{right}{inverse}{constant}={product}", f"{product}/{factor}={solution}"),
        )  # fmt: skip
