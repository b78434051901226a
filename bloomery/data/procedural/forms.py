"""The two forms of a problem: open, and multiple choice.

The same seed and settings with another `form` give the same problems, with the same stem in their ids, so that what is
asked and how it is asked can be told apart (Nemotron-CrossThink, arXiv 2504.13941, sections on templates).
"""

from collections.abc import Sequence
from random import Random
from typing import Literal

from bloomery.data.procedural.problem import Draft

Form = Literal["choice", "open"]
FORM_FIELD = "choice: the answer is an option's letter; open: it is a word"
CHOICES = 4


def distractors(canonical: str, answer: str, pool: Sequence[str]) -> list[str]:
    """Three wrong options out of `pool`, or as many as it has, chosen by the problem alone."""
    wrong = sorted({*pool} - {answer})
    return Random(f"distractors {canonical}").sample(wrong, min(CHOICES - 1, len(wrong)))


def in_form(
    form: Form, canonical: str, question: str, answer: str, others: Sequence[str], steps: tuple[str, ...], verifier: str
) -> Draft:
    """The open draft, or its multiple-choice twin with the options in an order that only the problem decides.

    others: the wrong options. verifier: judges the open form.
    """
    if form == "open":
        return Draft(canonical, question, answer, verifier, steps, variant="open", metadata={"form": form})
    options = [answer, *others]
    Random(canonical).shuffle(options)
    label = chr(ord("A") + options.index(answer))
    lettered = "\n".join(f"{chr(ord('A') + place)}) {option}" for place, option in enumerate(options))
    return Draft(
        canonical, f"{question}\n{lettered}", label, "choice", (*steps, f"{label}) {answer}"), variant="choice",
        metadata={"form": form, "options": options, "answer_text": answer},
    )  # fmt: skip
