"""Short answers in words: equal after a fixed, small normalisation."""

from bloomery.errors import ArtifactError
from bloomery.verify.extract import boxed_answer
from bloomery.verify.normalize import normalize
from bloomery.verify.verdict import Verdict

MAX_CHARS = 1000


def exact(completion: str, gold: str, require_think: bool = False) -> Verdict:
    """Is the boxed answer the gold text? Case, end punctuation, a leading article and spacing do not count."""
    expected = normalize(gold)
    if not expected:
        raise ArtifactError(
            f"a prompt with verifier 'exact' has the answer {gold!r}; expected a word or a short phrase"
        )
    found = boxed_answer(completion, require_think)
    if isinstance(found, Verdict):
        return found
    if len(found) > max(MAX_CHARS, 2 * len(gold)):
        return Verdict.of("parse_fail", f"{len(found)} characters, at most {MAX_CHARS}")
    return (
        Verdict.of("correct")
        if normalize(found) == expected
        else Verdict.of("wrong", f"{found[:80]} is not {gold[:80]}")
    )
