"""The noun of this package: one generated problem, and the draft a domain makes of it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Split = Literal["train", "test"]
Style = Literal["direct", "stepwise"]
TEST_SHARE = 10
"""One canonical form in this many belongs to the test split."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with a verifiable answer and one worked solution.

    `id` depends on the canonical form alone: equal problems have equal ids whatever the seed. `answer` is what the
    verifier named by `verifier` takes. `metadata` holds JSON values.
    """

    id: str
    domain: str
    question: str
    answer: str
    verifier: str
    solution: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Draft:
    """What a domain draws: a problem before it has an id, a split and a solution style.

    `canonical` is equal for problems that are the same up to order or layout. `variant` tells apart forms of one
    problem, such as its multiple-choice and its open form: they share a split and the stem of their id.
    """

    canonical: str
    question: str
    answer: str
    verifier: str
    steps: tuple[str, ...] = ()
    final: str | None = None
    variant: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the canonical form."""
        return hashlib.blake2b(self.canonical.encode(), digest_size=8).hexdigest()

    @property
    def split(self) -> Split:
        """The split this canonical form belongs to, for every seed and every setting."""
        return "test" if int(self.digest, 16) % TEST_SHARE == 0 else "train"

    def solution(self, style: Style) -> str:
        """`stepwise`: one terse step per operation, then the final answer; `direct`: the final answer only."""
        final = self.final if self.final is not None else rf"\boxed{{{self.answer}}}"
        return f"{';'.join(self.steps)}\n{final}" if style == "stepwise" else final
