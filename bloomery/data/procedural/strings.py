"""Text tasks over short random words: reverse, count a letter, sort the letters.

Steps spell the word first, because a tokenizer hides letters inside longer tokens.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import Literal, Self

from pydantic import model_validator

from bloomery.config import Config, Field
from bloomery.data.procedural.problem import Draft

Operation = Literal["reverse", "count", "sort"]


class StringOptions(Config):
    """Settings of `strings`."""

    operations: tuple[Operation, ...] = Field(
        default=("reverse", "count", "sort"), min_length=1, description="what to ask"
    )
    min_length: int = Field(default=3, ge=2, description="shortest word, in letters")
    max_length: int = Field(default=5, ge=2, description="longest word, in letters")
    letters: str = Field(default="abcdefgh", pattern="^[a-z]{2,}$", description="alphabet the words are drawn from")

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError("min_length is larger than max_length")
        if len(set(self.letters)) != len(self.letters):
            raise ValueError("letters names a letter twice")
        return self


def strings(options: StringOptions, random: Random) -> Iterator[Draft]:
    """Endless string problems, the operations in equal shares."""
    while True:
        length = random.randint(options.min_length, options.max_length)
        word = "".join(random.choices(options.letters, k=length))
        yield _MAKERS[random.choice(options.operations)](word, random)


def _reverse(word: str, random: Random) -> Draft:
    answer = word[::-1]
    return _draft("reverse", f"reverse {word}", answer, "exact", (_spell(word), _spell(answer)))


def _sort(word: str, random: Random) -> Draft:
    answer = "".join(sorted(word))
    return _draft("sort", f"sort {word}", answer, "exact", (_spell(word), _spell(answer)))


def _count(word: str, random: Random) -> Draft:
    letter = random.choice(word)
    running = (f"{seen}{word[: place + 1].count(letter)}" for place, seen in enumerate(word))
    return _draft("count", f"count {letter} in {word}", str(word.count(letter)), "answer", ("-".join(running),))


def _draft(operation: Operation, question: str, answer: str, verifier: str, steps: tuple[str, ...]) -> Draft:
    return Draft(question, question, answer, verifier, steps, metadata={"operation": operation})


def _spell(word: str) -> str:
    return "-".join(word)


_MAKERS: dict[Operation, Callable[[str, Random], Draft]] = {"reverse": _reverse, "count": _count, "sort": _sort}
