"""Text tasks over short random words: reverse one, count a letter, sort its letters, sort several of them.

Steps spell the word first, because a tokenizer hides letters inside longer tokens.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Literal, Self

from pydantic import model_validator

from bloomery.config import Config, Field
from bloomery.data.procedural.forms import CHOICES, FORM_FIELD, Form, in_form
from bloomery.data.procedural.problem import Draft

Operation = Literal["reverse", "count", "sort", "words"]
_WORDS, _TRIES = 3, 20


class StringOptions(Config):
    """Settings of `strings`."""

    form: Form = Field(default="open", description=FORM_FIELD)
    operations: tuple[Operation, ...] = Field(
        default=("reverse", "count", "sort"), min_length=1,
        description="what to ask; words: three words in the order of the alphabet",
    )  # fmt: skip
    min_length: int = Field(default=3, ge=2, description="shortest word, in letters")
    max_length: int = Field(default=5, ge=2, description="longest word, in letters")
    letters: str = Field(default="abcdefgh", pattern="^[a-z]{2,}$", description="alphabet the words are drawn from")

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError("min_length is larger than max_length")
        if len(set(self.letters)) != len(self.letters):
            raise ValueError("letters names a letter twice")
        if "words" in self.operations and len(self.letters) < _WORDS:
            raise ValueError(f"letters: {_WORDS} words that begin differently need as many letters")
        return self


def strings(options: StringOptions, random: Random) -> Iterator[Draft]:
    """Endless string problems, the operations in equal shares."""
    while True:
        word = _word(options, random)
        operation = random.choice(options.operations)
        yield _words(word, options, random) if operation == "words" else _MAKERS[operation](word, options.form, random)


def _word(options: StringOptions, random: Random) -> str:
    return "".join(random.choices(options.letters, k=random.randint(options.min_length, options.max_length)))


def _reverse(word: str, form: Form, random: Random) -> Draft:
    answer = word[::-1]
    return _draft(form, "reverse", f"reverse {word}", answer, (_spell(word), _spell(answer)))


def _sort(word: str, form: Form, random: Random) -> Draft:
    answer = "".join(sorted(word))
    return _draft(form, "sort", f"sort {word}", answer, (_spell(word), _spell(answer)))


def _count(word: str, form: Form, random: Random) -> Draft:
    letter = random.choice(word)
    running = (f"{seen}{word[: place + 1].count(letter)}" for place, seen in enumerate(word))
    return _draft(form, "count", f"count {letter} in {word}", str(word.count(letter)), ("-".join(running),))


def _words(word: str, options: StringOptions, random: Random) -> Draft:
    """Words that begin with different letters, so that a first look decides."""
    chosen = [word]
    while len(chosen) < _WORDS:
        other = _word(options, random)
        if all(other[0] != known[0] for known in chosen):
            chosen.append(other)
    answer = " ".join(sorted(chosen))
    firsts = "-".join(sorted(known[0] for known in chosen))
    return _draft(options.form, "words", f"words {' '.join(chosen)}", answer, (firsts, answer))


def _draft(form: Form, operation: Operation, question: str, answer: str, steps: tuple[str, ...]) -> Draft:
    numeric = operation == "count"
    others = _near_numbers(question, answer) if numeric else _shuffled(question, answer)
    drawn = in_form(form, question, question, answer, others, steps, "answer" if numeric else "exact")
    return replace(drawn, metadata={**drawn.metadata, "operation": operation})


def _near_numbers(question: str, answer: str) -> list[str]:
    return Random(question).sample([str(n) for n in range(CHOICES + 1) if str(n) != answer], CHOICES - 1)


def _shuffled(question: str, answer: str) -> list[str]:
    """The same letters, or words, in other orders; where these are too few, with more of the letters."""
    random, found = Random(question), [answer]
    parts, between = (answer.split(), " ") if " " in answer else (list(answer), "")
    for attempt in itertools.count():
        text = between.join(random.sample(parts, len(parts)) + random.choices(parts, k=attempt // _TRIES))
        if text not in found:
            found.append(text)
        if len(found) == CHOICES:
            break
    return found[1:]


def _spell(word: str) -> str:
    return "-".join(word)


_MAKERS: dict[Operation, Callable[[str, Form, Random], Draft]] = {"reverse": _reverse, "count": _count, "sort": _sort}
