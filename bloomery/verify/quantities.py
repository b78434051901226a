"""Numbers with units as people write them: `3 kg`, `twelve apples`, `$5`, `40 percent`, `2.5 million`, `3 1/2 cups`."""

import re
from dataclasses import dataclass
from fractions import Fraction

from bloomery.verify.normalize import DIGITS, unified
from bloomery.verify.numbers import read_number

_QUANTITY = re.compile(
    r"(?P<sign>[-+]?)(?P<currency>[$€£¥₹]?)\s*"
    r"(?P<value>(?:\d+ )?\d+/\d+|(?:\d[\d,]*)?(?:\.\d+)?(?:e[-+]?\d{1,3})?)"
    r"(?P<rest>[^\d]*)"
)
_UNIT = re.compile(r"%|°[cf]?|[^\W\d_]+\.?|[^\W\d_]+(?:\^-?\d)?(?:/[^\W\d_]+(?:\^-?\d)?)?")
_NOT_UNITS = frozenset({"or", "and", "not", "to", "by", "plus", "minus", "times", "over", "half", "pi", "e"})
_ARTICLES = ("the", "a", "an")
_ENDS = " \t\n*()[]\"'!?,;:"
_POWERS = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
_NAMES = {
    "%": "percent", "per cent": "percent", "°": "degree", "°c": "celsius", "°f": "fahrenheit",
    "degree celsius": "celsius", "degrees celsius": "celsius", "celsius": "celsius",
    "degree fahrenheit": "fahrenheit", "degrees fahrenheit": "fahrenheit", "usd": "dollar", "us dollar": "dollar",
    "eur": "euro", "gbp": "pound", "kg": "kilogram", "g": "gram", "mg": "milligram", "t": "ton", "tonne": "ton",
    "km": "kilometer", "kilometre": "kilometer", "m": "meter", "metre": "meter", "cm": "centimeter",
    "centimetre": "centimeter", "mm": "millimeter", "millimetre": "millimeter", "mi": "mile", "ft": "foot",
    "feet": "foot", "inches": "inch", "lb": "pound", "lbs": "pound", "l": "liter", "litre": "liter",
    "ml": "milliliter", "millilitre": "milliliter", "s": "second", "sec": "second", "min": "minute", "h": "hour",
    "hr": "hour", "hrs": "hour", "yr": "year", "yrs": "year", "people": "person", "men": "man", "women": "woman",
    "children": "child", "km/h": "kilometer/hour", "kph": "kilometer/hour", "mph": "mile/hour", "m/s": "meter/second",
}  # fmt: skip
_MOST_WORDS = 3
_TOLERANCE = Fraction(1, 10**6)


@dataclass(frozen=True, slots=True)
class Quantity:
    """An exact value and its unit, "" where none is written."""

    value: Fraction
    unit: str

    def equals(self, other: "Quantity") -> bool:
        """Same unit, and equal values: whole numbers exactly, others within a millionth of the larger."""
        if self.unit != other.unit:
            return False
        if self.value.denominator == other.value.denominator == 1:
            return self.value == other.value
        return abs(self.value - other.value) <= _TOLERANCE * max(abs(self.value), abs(other.value))


def read_quantity(text: str) -> Quantity | None:
    """The number that `text` writes out, with what it counts or measures, or `None` where it says anything else.

    At most three words of unit; spellings of common units are one (`kg`, `kilograms`), but 3000 g is not 3 kg.
    """
    bare = unified(text).replace("\\%", "%").replace("\\$", "$").strip(_ENDS).rstrip(".")
    if "\\" in bare:
        number = read_number(bare)
        return None if number is None else Quantity(number.value, _named(number.unit))
    bare = bare[1:-1] if len(bare) > 2 and bare[0] == bare[-1] == "$" else bare
    words = [DIGITS.get(word, word) for word in bare.split()]
    match = _QUANTITY.fullmatch(" ".join(words[1:] if words and words[0] in _ARTICLES else words))
    if match is None:
        return None
    value = _value(match["value"])
    factor, unit = _unit(match["rest"].split())
    if value is None or unit is None or (unit and match["currency"]):
        return None
    signed = -value if match["sign"] == "-" else value
    return Quantity(signed * factor, _CURRENCIES.get(match["currency"], unit))


def _value(text: str) -> Fraction | None:
    """A literal, or a mixed number such as `3 1/2`."""
    whole, _, part = text.rpartition(" ")
    number = read_number(part) if part else None
    if number is None:
        return None
    return number.value + int(whole) if whole else number.value


def _unit(words: list[str]) -> tuple[int, str | None]:
    """(factor, unit) of what stands behind a number; no unit where it is no unit."""
    factor = 1
    while words and words[0] in _POWERS:
        factor *= _POWERS[words.pop(0)]
    if len(words) > _MOST_WORDS or _NOT_UNITS.intersection(words) or not all(map(_UNIT.fullmatch, words)):
        return factor, None
    return factor, _named(" ".join(word.rstrip(".") for word in words))


def _named(unit: str) -> str:
    """One name for the spellings of a unit."""
    singular = unit.removesuffix("s") if len(unit) > 2 and not unit.endswith("ss") else unit
    return next((_NAMES[name] for name in (unit, singular) if name in _NAMES), singular)
