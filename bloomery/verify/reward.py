"""The reward of a completion: from whether its answer is right and whether its form is kept."""

from typing import Literal, Self

from pydantic import model_validator

from bloomery.config import Config, Field
from bloomery.verify.format import format_verdict
from bloomery.verify.verdict import Verdict

Combination = Literal["and", "product", "sum", "accuracy"]
FORMLESS = frozenset({"program", "format"})
"""Verifiers whose answers stand in no box: a code fence has a form of its own, and `format` is one."""


class Reward(Config):
    """How accuracy R_acc and format R_format, each 0 or 1, make the reward R (Nemotron-CrossThink: R = R_acc and
    R_format)."""

    combine: Combination = Field(
        default="and",
        description="and: 1 where both are 1 · product: R_acc · (1 − w + w · R_format) · sum: (1 − w) · R_acc + "
        "w · R_format · accuracy: R_acc, the format is only logged",
    )
    format_weight: float | None = Field(
        default=None, gt=0, lt=1, description="w of product and sum: what the format is worth"
    )

    @model_validator(mode="after")
    def _weighed(self) -> Self:
        weighs = self.combine in ("product", "sum")
        if weighs and self.format_weight is None:
            raise ValueError(f"format_weight: missing; combine: {self.combine} needs it, for example 0.1")
        if not weighs and self.format_weight is not None:
            raise ValueError(f"format_weight: without effect under combine: {self.combine}; leave it out")
        return self

    def of(self, accuracy: Verdict, form: Verdict) -> Verdict:
        """The verdict that is learnt from. What could not be judged stays so; a right answer that its form spoils has
        the form's status."""
        if accuracy.score is None or self.combine == "accuracy":
            return accuracy
        right, kept, weight = float(accuracy.correct), float(form.correct), self.format_weight or 0.0
        if right and kept:
            score = 1.0
        elif self.combine == "sum":
            score = (1 - weight) * right + weight * kept
        elif self.combine == "product":
            score = right * (1 - weight + weight * kept)
        else:
            score = right * kept
        if accuracy.correct and not form.correct:
            return Verdict(score, form.status, f"right, but its form: {form.reason}")
        return Verdict(score, accuracy.status, accuracy.reason)


def form_of(completion: str, require_think: bool = False) -> Verdict:
    """R_format (arXiv 2504.13941): one `<think>…</think>` at the start with something in it, then exactly one box.

    Without `require_think` both tags may be absent. What is written behind the box does not count.
    """
    return format_verdict(completion, "", require_think, box_last=False)
