"""Numbers as a reader wants them: few digits, a unit, one spelling everywhere."""

import math
import time
from typing import Any

_COUNTS = (
    "documents", "rows", "tokens", "parameters", "steps", "step", "examples", "prompts", "words", "samples", "problems",
    "drops", "kept", "dropped", "n", "sequences", "merges", "pairs", "vocab_size", "characters", "count",
)  # fmt: skip
_SHARES = ("accuracy", "share", "fraction", "rate", "ratio", "weight", "planned", "read")
_THIN = "\N{NARROW NO-BREAK SPACE}"


def quantity(name: str, value: Any) -> str:
    """`value` with the unit that the words of its `name` imply; anything that is not a number as plain text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if not isinstance(value, int | float):
        return str(value)
    words = name.lower().replace("/", "_").split("_")
    if "seconds" in words and "per" not in words:
        return duration(value)
    if "bytes" in words:
        return size(value)
    if ("@" in name or (set(words) & set(_SHARES) and "learning" not in words)) and 0 <= value <= 1:
        return percent(value)
    if set(words) & set(_COUNTS) and float(value).is_integer():
        return count(int(value))
    return number(value)


def number(value: float) -> str:
    """Four significant digits, thousands apart, a power of ten only where zeros would hide the digits."""
    if isinstance(value, int):
        return grouped(value)
    if not math.isfinite(value):
        return "not finite"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    digits = max(0, 4 - max(1, len(str(int(abs(value))))))
    text = f"{value:,.{digits}f}".replace(",", _THIN)
    return text.rstrip("0").rstrip(".") if "." in text else text


def grouped(value: int) -> str:
    """12345 → 12 345, with thin spaces."""
    return f"{value:,}".replace(",", _THIN)


def count(value: int) -> str:
    """Exact below a hundred thousand, three digits and a magnitude above."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e5, "k")):
        if abs(value) >= factor:
            scaled = value / (1e3 if letter == "k" else factor)
            return f"{scaled:.{max(0, 3 - len(str(int(abs(scaled)))))}f} {letter}"
    return grouped(value)


def size(value: float) -> str:
    """Bytes in binary units."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} bytes"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share: float) -> str:
    """0.613 → 61.3 %."""
    return f"{100 * share:.1f}{_THIN}%"


def signed(value: float, digits: int = 1) -> str:
    """With its sign, a true minus, and no sign on a zero."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def moment(seconds: float) -> str:
    """Seconds since 1970 as a UTC date and minute."""
    return time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime(seconds))


def words(name: str) -> str:
    """`validation_loss` → `validation loss`."""
    return name.replace("_", " ").replace(".", " · ")
