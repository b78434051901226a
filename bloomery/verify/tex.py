r"""TeX's own reading of arguments without braces: `\frac12` is `\frac{1}{2}`, `\sqrt3` is `\sqrt{3}`."""

import re

_COMMAND = re.compile(r"\\[dt]?frac(?![A-Za-z])|\\sqrt(?![A-Za-z])(?:\s*\[[^\]]*\])?")
_TOKEN = re.compile(r"\s*(\\[A-Za-z]+|[0-9A-Za-z])")


def brace_arguments(text: str) -> str:
    r"""`text` with every argument of `\frac` and `\sqrt` in braces. One digit, letter or command is one argument."""
    done, place = [], 0
    for command in _COMMAND.finditer(text):
        if command.start() < place:  # an argument of the command before: \frac\frac123 is no TeX
            continue
        done.append(text[place : command.end()])
        place = command.end()
        for _ in range(2 if "frac" in command.group() else 1):
            argument = _TOKEN.match(text, place)
            group = _group(text, place)
            if argument:
                done.append(f"{{{argument.group(1)}}}")
                place = argument.end()
            elif group > place:
                done.append(brace_arguments(text[place:group]))
                place = group
    return "".join(done) + text[place:]


def _group(text: str, place: int) -> int:
    """The end of the braced group that starts at `place`, or `place` where none does."""
    start = place
    while text[start : start + 1].isspace():
        start += 1
    if text[start : start + 1] != "{":
        return place
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return position + 1
    return place
