"""Where the answer stands in a completion: after the last `</think>`, in the last `\\boxed{…}`."""

import re

from bloomery.verify.verdict import Verdict

MAX_CHARS = 200_000
"""Longest text after the thinking part that is searched for boxes; every honest answer is far shorter."""

_MAX_NESTED_BOXES = 3
_OPEN, _CLOSE = "<think>", "</think>"
_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def after_thinking(completion: str, require_think: bool = False) -> str | Verdict:
    """The text after the last `</think>`; the whole completion where nothing was thought and nothing requires it."""
    _, close, text = completion.rpartition(_CLOSE)
    if not close and (require_think or _OPEN in completion):
        return Verdict.of("no_think", f"no {_CLOSE} in the completion")
    return text


def boxes(text: str) -> list[str] | None:
    """Contents of all outermost boxes in order, braces matched, escaped braces ignored; `None` if one never closes."""
    found: list[str] = []
    opened: list[int | None] = []  # where the content of each open group starts; None for a group that is no box
    depth = 0  # open boxes
    for token in _TOKENS.finditer(text):
        if token.group() == "}":
            start = opened.pop() if opened else None
            if start is not None:
                depth -= 1
                if depth == 0:
                    found.append(text[start : token.start()])
        elif token.group() == "{":
            opened.append(None)
        elif token.group().startswith(r"\boxed"):
            opened.append(token.end())
            depth += 1
    return found if depth == 0 else None


def boxed_answer(completion: str, require_think: bool = False) -> str | Verdict:
    """The content of the last box, or the verdict that there is no single answer.

    Boxes that disagree are `multi_box`: a completion that states several answers has not chosen one.
    """
    text = after_thinking(completion, require_think)
    return text if isinstance(text, Verdict) else _single_box(text)


def _single_box(text: str) -> str | Verdict:
    if r"\boxed" not in text:
        return Verdict.of("no_answer", "no box")
    if len(text) > MAX_CHARS:
        return Verdict.of("parse_fail", f"the answer part has {len(text)} characters, at most {MAX_CHARS} are read")
    found = boxes(text)
    if found is None:
        return Verdict.of("no_answer", "a box is never closed")
    contents = [_unwrap(content) for content in found]
    if not contents or not contents[-1]:
        return Verdict.of("no_answer", "the box is empty" if contents else "no box")
    if any(content != contents[-1] for content in contents):
        return Verdict.of("multi_box", f"{len(contents)} boxes with different contents")
    return contents[-1]


def _unwrap(content: str) -> str:
    """`\\boxed{\\boxed{3}}` says 3."""
    content = content.strip()
    for _ in range(_MAX_NESTED_BOXES):
        inner = boxes(content) if content.startswith(r"\boxed") else None
        if not inner or content != rf"\boxed{{{inner[0]}}}":
            break
        content = inner[0].strip()
    return content
