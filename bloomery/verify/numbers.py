"""Reading a number that is written out: `21`, `-1,234.50`, `3/4`, `\\frac{3}{4}`, `\\$5`, `40\\%`, `5\\text{ cm}`.

Only literals are read, never expressions: what would have to be computed is not yet an answer.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from bloomery.verify.tex import brace_arguments

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"([+-]?)({_DECIMAL})(?:e([+-]?\d{{1,3}})|\\times10\^\{{?([+-]?\d{{1,3}})\}}?)?")
_SLASH = re.compile(r"([+-]?)(\d+)/(\d+)")
_FRAC = re.compile(r"([+-]?)\\frac\{([+-]?\d+)\}\{(\d+)\}")
_MIXED = re.compile(r"([+-]?)(\d+)\\frac\{(\d+)\}\{(\d+)\}")

_UNIT = re.compile(r"(?:\\text|\\mathrm|\\textrm|\\mbox)\s*\{\s*([A-Za-z][A-Za-z .]*?)\s*\}(?:\^\{?[23]\}?)?$")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?$")
_NAME = re.compile(r"^[A-Za-z]\s*=(?!=)")
_NOT_UNITS = frozenset({
    "or", "and", "not", "to", "by", "plus", "minus", "times", "over", "hundred", "thousand", "million", "billion",
    "trillion", "dozen", "half", "percent", "pi",
})  # fmt: skip
_REPLACED = (
    ("−", "-"), ("\u2009", " "), (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\left", ""), (r"\right", ""),
    ("{,}", ","), (r"\!", ""), (r"\,", " "), (r"\;", " "), (r"\ ", " "), ("~", " "), (r"\cdot10^", r"\times10^"),
)  # fmt: skip
MAX_LITERAL_CHARS = 100


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value, the unit written after it ("" where there is none), and whether it was written as a decimal."""

    value: Fraction
    unit: str
    decimal: bool

    def equals(self, other: "Number") -> bool:
        """Equal values and no contradiction between units.

        A fraction that no decimal expresses also equals its decimal rounded to 6 places or more: 1/3 and 0.333333.
        """
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if self.value == other.value:
            return True
        written = [number for number in (self, other) if number.decimal]
        return len(written) == 1 and round(self.value, 6) == round(other.value, 6) and not _terminates(self, other)


def _terminates(first: Number, second: Number) -> bool:
    fraction = second if first.decimal else first
    rest = fraction.value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def read_number(text: str) -> Number | None:
    """The number that `text` writes out, or `None`.

    Dropped around it: `$` delimiters, a currency sign in front, `%` behind (so 40% is 40, never 0.4), `x=` in front,
    degrees, and one unit in `\\text{}` whose words are letters only and no numerals such as "million".
    """
    if len(text) > MAX_LITERAL_CHARS:
        return None
    text = unicodedata.normalize("NFKC", text)
    for old, new in _REPLACED:
        text = text.replace(old, new)
    text, unit = _split_unit(_bare(brace_arguments(text)))
    text = re.sub(r"\s+", "", text)
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    value = _value(text)
    return None if value is None else Number(value, unit, "." in text or "e" in text.lower())


def _bare(text: str) -> str:
    text = text.strip().removesuffix(".").strip()
    text = _NAME.sub("", text.strip("$").strip(), count=1).strip()
    negative = text.startswith("-")
    text = text.removeprefix("-").strip().removeprefix("\\$").removeprefix("$").strip()
    text = _DEGREES.sub("", text.removesuffix("%").removesuffix("\\").strip()).strip()
    return f"-{text}" if negative else text


def _split_unit(text: str) -> tuple[str, str]:
    match = _UNIT.search(text)
    if match is None:
        return text, ""
    words = match.group(1).lower().rstrip(".").split()
    if len(words) > 3 or _NOT_UNITS & set(words):
        return text, ""
    return text[: match.start()], " ".join(word.removesuffix("s").removesuffix("e") for word in words)


def _value(text: str) -> Fraction | None:
    if match := _PLAIN.fullmatch(text):
        sign, digits, exponent, power = match.groups()
        return Fraction(sign + digits.replace(",", "").rstrip(".")) * Fraction(10) ** int(exponent or power or 0)
    if match := _MIXED.fullmatch(text):
        sign, whole, above, below = match.groups()
        return None if int(below) == 0 else Fraction(sign + "1") * (int(whole) + Fraction(int(above), int(below)))
    if match := _SLASH.fullmatch(text) or _FRAC.fullmatch(text):
        sign, above, below = match.groups()
        return None if int(below) == 0 else Fraction(sign + "1") * Fraction(int(above), int(below))
    return None
