"""Dates: on which day of the week a later day of the same month falls.

With `schedule` one of the two domains that the claim on many domains (Nemotron-CrossThink, arXiv 2504.13941) never
trains on, to see what carries over.
"""

from collections.abc import Iterator
from random import Random

from bloomery.config import Config, Field
from bloomery.data.procedural.forms import FORM_FIELD, Form, distractors, in_form
from bloomery.data.procedural.problem import Draft

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_LAST = 28  # a day that every month has


class CalendarOptions(Config):
    """Settings of `calendar`."""

    form: Form = Field(default="open", description=FORM_FIELD)
    max_days: int = Field(default=13, ge=7, le=_LAST - 1, description="most days between the two dates")


def calendars(options: CalendarOptions, random: Random) -> Iterator[Draft]:
    """Endless dates: `May 3 is Tue. May 12?`"""
    while True:
        month, weekday = random.choice(MONTHS), random.randrange(len(DAYS))
        days = random.randint(1, options.max_days)
        start = random.randint(1, _LAST - days)
        answer = DAYS[(weekday + days) % 7]
        question = f"{month} {start} is {DAYS[weekday]}.\n{month} {start + days}?"
        canonical = f"calendar {question}"
        steps = [f"{start + days}-{start}={days}"]
        if days >= 7:
            steps.append(f"{days}-{days - days % 7}={days % 7}")
        steps.append(" ".join(DAYS[(weekday + passed) % 7] for passed in range(days % 7 + 1)))
        yield in_form(
            options.form, canonical, question, answer, distractors(canonical, answer, DAYS), tuple(steps), "exact"
        )
