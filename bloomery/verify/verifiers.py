"""The table of verifiers, and the lookup that explains a wrong name."""

import difflib
from collections.abc import Callable

from bloomery.errors import ConfigError
from bloomery.verify.answer import answer
from bloomery.verify.choice import choice, label
from bloomery.verify.deferred import Deferred
from bloomery.verify.exact import exact
from bloomery.verify.format import format_verdict
from bloomery.verify.gym import gym
from bloomery.verify.program import program
from bloomery.verify.short import short
from bloomery.verify.verdict import Verdict

Verifier = Callable[[str, str, bool], Verdict | Deferred]
"""(completion, answer, require_think) → the verdict, or work for a worker process."""

VERIFIERS: dict[str, Verifier] = {
    "answer": answer,
    "choice": choice,
    "exact": exact,
    "format": format_verdict,
    "gym": gym,
    "label": label,
    "program": program,
    "short": short,
}

ANSWER_FORMS = {"label": "label", "short": "short", "math": "answer"}
"""Form of an answer (arXiv 2504.13941) → the verifier that judges it."""


def lookup(name: str) -> Verifier:
    """The verifier of that name; `ConfigError` with the nearest names where there is none."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    nearest = difflib.get_close_matches(name, VERIFIERS, n=2)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known: {', '.join(VERIFIERS)}"
    raise ConfigError(f"verifier {name!r}: unknown; {hint}")


def for_form(answer_form: str) -> str:
    """The name of the verifier of an answer form; `ConfigError` where there is none."""
    if answer_form not in ANSWER_FORMS:
        raise ConfigError(f"answer form {answer_form!r}: unknown; choose {', '.join(ANSWER_FORMS)}")
    return ANSWER_FORMS[answer_form]
