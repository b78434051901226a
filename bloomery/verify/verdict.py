"""What a verifier says about one completion."""

from dataclasses import dataclass
from typing import Literal

Status = Literal[
    "correct", "wrong", "no_think", "no_answer", "multi_box", "parse_fail", "timeout", "infra_error"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """`score` is 1 for `correct`, `None` for `infra_error` (the completion could not be judged: missing data, never a
    zero) and 0 for every other status. `reason` is for people and may be empty.
    """

    score: float | None
    status: Status
    reason: str = ""

    @property
    def correct(self) -> bool:
        """Whether the completion earned the full score."""
        return self.score is not None and self.score >= 1

    @classmethod
    def of(cls, status: Status, reason: str = "") -> "Verdict":
        """The verdict with the score that belongs to its status."""
        return cls({"correct": 1.0, "infra_error": None}.get(status, 0.0), status, reason)
