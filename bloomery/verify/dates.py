"""Dates as people write them: `1969-07-20`, `20 July 1969`, `July 20th, 1969`, `July 1969`, `20/07/1969`."""

import calendar
import re
from dataclasses import dataclass

from bloomery.verify.normalize import unified

_NAMES = {name.lower(): number for number, name in enumerate(calendar.month_name) if name}
_MONTHS = _NAMES | {name.lower(): number for number, name in enumerate(calendar.month_abbr) if name} | {"sept": 9}
_WEEKDAYS = tuple(name.lower() for name in (*calendar.day_name, *calendar.day_abbr))
_MONTH = rf"(?P<month>{'|'.join(sorted(_MONTHS, key=len, reverse=True))})\.?"
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>\d{3,4})"
_FORMS = tuple(
    re.compile(form)
    for form in (
        r"(?P<year>\d{4})[-/.](?P<month>\d{1,2})[-/.](?P<day>\d{1,2})",
        rf"(?:the )?{_DAY} (?:of )?{_MONTH}(?:,? {_YEAR})?",
        rf"{_MONTH} {_DAY}(?:,? {_YEAR})?",
        rf"{_MONTH},? (?:of )?{_YEAR}",
    )
)
_NUMERIC = re.compile(r"(\d{1,2})[-/.](\d{1,2})[-/.](\d{4})")


@dataclass(frozen=True, slots=True)
class Date:
    """A day, or as much of it as is written; `None` for what is not. Equal where the same is written and equal."""

    year: int | None
    month: int
    day: int | None


def read_date(text: str) -> Date | None:
    """The date that `text` is, or `None`. `03/04/1969` is two dates, so it is none; `20/07/1969` is one."""
    words = unified(text).strip(' \t\n*()[]".').split()
    if len(words) > 1 and words[0].rstrip(",.") in _WEEKDAYS:
        words = words[1:]
    text = " ".join(words)
    for form in _FORMS:
        if match := form.fullmatch(text):
            found = match.groupdict()
            month = found["month"]
            return _valid(found.get("year"), int(month) if month.isdigit() else _MONTHS[month], found.get("day"))
    if match := _NUMERIC.fullmatch(text):
        first, second, year = match.groups()
        days = {(first, second), (second, first)} if first != second else {(first, second)}
        possible = {date for day, month in days if (date := _valid(year, int(month), day))}
        return possible.pop() if len(possible) == 1 else None
    return None


def _valid(year: str | None, month: int, day: str | None) -> Date | None:
    """A date that the calendar has."""
    if not 1 <= month <= 12:
        return None
    longest = 29 if month == 2 and year is None else calendar.monthrange(int(year or 2000), month)[1]
    if day is not None and not 1 <= int(day) <= longest:
        return None
    return Date(None if year is None else int(year), month, None if day is None else int(day))
