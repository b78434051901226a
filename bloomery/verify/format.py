"""The form of a completion, apart from whether it is right: thinking first, then one boxed answer, then nothing."""

import re

from bloomery.verify.extract import MAX_CHARS, boxes
from bloomery.verify.verdict import Verdict

_CLOSING = re.compile(r"[\s.$*)\]\\]*")


def format_verdict(
    completion: str, gold: str = "", require_think: bool = False, box_last: bool = True
) -> Verdict:  # fmt: skip
    """`correct` when the form is kept. `gold` plays no part.

    Thinking: at most one `<think>`, at the very start (absent where the prompt already opened it), exactly one
    `</think>`, something between them; without `require_think` both tags may be absent. Then exactly one box, none of
    it inside the thinking, and, with `box_last`, nothing after it but closing punctuation.
    """
    thought, close, answer = completion.partition("</think>")
    if close or require_think or "<think>" in completion:
        if not close or "</think>" in answer:
            return Verdict.of("no_think", "expected exactly one </think>")
        body = thought.lstrip().removeprefix("<think>")
        if "<think>" in body or "<think>" in answer or not body.strip():
            return Verdict.of("no_think", "expected one <think> at the start and some text in it")
        if r"\boxed" in body:
            return Verdict.of("multi_box", "a box inside the thinking")
    else:
        answer = completion
    return _one_box(answer, box_last)


def _one_box(text: str, box_last: bool) -> Verdict:
    count = text.count(r"\boxed")
    if count != 1:
        return Verdict.of("multi_box" if count else "no_answer", f"{count} boxes, expected 1")
    if len(text) > MAX_CHARS:
        return Verdict.of("parse_fail", f"the answer part has {len(text)} characters, at most {MAX_CHARS} are read")
    content = boxes(text)
    if not content or not content[0].strip():
        return Verdict.of("no_answer", "the box is empty or never closed")
    if not box_last:
        return Verdict.of("correct")
    end = text.index(content[0], text.index(r"\boxed")) + len(content[0]) + 1
    return Verdict.of("correct") if _CLOSING.fullmatch(text, end) else Verdict.of("wrong", "text after the box")
