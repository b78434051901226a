"""Courses that need one another: which one can be taken next.

With `calendar` one of the two domains that the claim on many domains (Nemotron-CrossThink, arXiv 2504.13941) never
trains on, to see what carries over.
"""

import itertools
from collections.abc import Iterator
from random import Random

from bloomery.config import Config, Field
from bloomery.data.procedural.forms import FORM_FIELD, Form, distractors, in_form
from bloomery.data.procedural.problem import Draft

COURSES = ("art", "law", "math", "music", "sport", "drama", "logic", "latin", "chess", "dance")


class ScheduleOptions(Config):
    """Settings of `schedule`."""

    form: Form = Field(default="open", description=FORM_FIELD)
    courses: int = Field(default=4, ge=3, le=8, description="courses, each of which needs the one before")


def schedules(options: ScheduleOptions, random: Random) -> Iterator[Draft]:
    """Endless courses: `law needs art. math needs law. done art.` asks for the next."""
    while True:
        row = random.sample(COURSES, options.courses)
        done = random.randint(1, len(row) - 1)
        needs = [f"{later} needs {earlier}" for earlier, later in itertools.pairwise(row)]
        facts = random.sample(needs, len(needs))
        taken = " ".join(random.sample(row[:done], done))
        canonical, answer = f"schedule {done} {row}", row[done]
        yield in_form(
            options.form, canonical, ". ".join(facts) + f". done {taken}.\nnext?", answer,
            distractors(canonical, answer, row), (" ".join(row), answer), "exact",
        )  # fmt: skip
