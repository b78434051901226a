"""The one form in which texts are compared: what is not part of an answer, such as case and dress, is taken away."""

import re
import unicodedata

_NUMERALS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
DIGITS = {word: str(value) for value, word in enumerate(_NUMERALS)}
_SAME = str.maketrans(
    dict.fromkeys("‐‑‒–—−", "-") | dict.fromkeys("‘’ʼ`", "'") | dict.fromkeys("“”„«»", '"')
    | {"⁄": "/", "٫": ".", "٬": ",", "،": ",", "؛": ";", "؟": "?", "、": ",", "。": ".", "ـ": None}
)  # fmt: skip
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹]+")
_HALF_AFTER_DIGIT = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")
_ENDS = " \t\n.,;:!?\"'()[]$*"
_ARTICLES = ("the", "a", "an")
_ALPHABETS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN")
"""Scripts whose letters look alike: a word holds one of them."""


def plain(text: str) -> str:
    r"""NFKC without invisible characters, digits of every script as 0–9, and the content of `\text{…}` in its place.

    NFKC alone would read 10² as 102 and 3½ as 31/2: powers are written 10^2, and a fraction stands apart.
    """
    if not text.isascii():
        text = _HALF_AFTER_DIGIT.sub(" ", text)
        text = _SUPERSCRIPT.sub(lambda match: f"^{match.group()}", text)
        text = "".join(_visible(character) for character in unicodedata.normalize("NFKC", text))
    return _TEXT.sub(r"\1", text)


def _visible(character: str) -> str:
    """Marks of writing direction and joiners are dropped: they are no part of what is said."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return "" if unicodedata.category(character) == "Cf" else character


def unified(text: str) -> str:
    """`plain`, with one kind of dash, quote and separator, in lower case (casefolded, composed)."""
    text = plain(text).translate(_SAME).casefold()
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def normalize(text: str) -> str:
    """The form in which two short answers are compared.

    Case, punctuation at the ends, a leading article and spacing do not count; numerals up to twenty are digits.
    """
    words = [DIGITS.get(word, word) for word in _bare(unified(text)).split()]
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(words)


def _bare(text: str) -> str:
    """Without punctuation at its ends; the point of .5 is none."""
    bare = text.strip(_ENDS)
    pointed = bare[:1].isdigit() and text[: text.index(bare)].endswith(".")
    return f".{bare}" if pointed else bare


def mixed_scripts(text: str) -> str | None:
    """The first word whose letters are of several scripts that look alike, such as a Latin word with a Cyrillic а."""
    if text.isascii():
        return None
    return next((word for word in plain(text).split() if len({*map(_alphabet, word)} - {""}) > 1), None)


def _alphabet(character: str) -> str:
    if not character.isalpha():
        return ""
    script = unicodedata.name(character, "").partition(" ")[0]
    return script if script in _ALPHABETS else ""
