"""The nouns: a claim, what it expects, and what was found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bloomery.errors import ConfigError
from bloomery.evaluate.statistics import Difference, verdict

JSONValue = Any
Cells = dict[tuple[str, int], dict[str, JSONValue]]
DEVELOPMENT_SEEDS = 900
"""Seeds from here on are for development (sizes, learning rates) and smoke tests; those below judge."""


@dataclass(frozen=True)
class Finding:
    """A sentence of the paper with its measured effect, the 95 % interval and the verdict."""

    claim: str
    direction: str
    effect: float
    ci: tuple[float, float]
    verdict: Literal["shown", "not shown", "inconclusive"]
    published: str
    note: str = ""


@dataclass(frozen=True)
class Expectation:
    """What would show a sentence of the paper, written down before measuring.

    direction: `above` or `below` the threshold, or `within` ± threshold (equivalence). The threshold has the unit of
    the effect. published: the paper's own number, for comparison.
    """

    claim: str
    direction: Literal["above", "below", "within"]
    threshold: float
    published: str
    note: str = ""

    def judged(self, measured: Difference, note: str = "", telling: bool = True) -> Finding:
        """The finding for a measured effect and its interval; `note` adds to what was written down before.

        telling: false where a control of the claim has failed, so that the numbers cannot tell, whatever they are.
        """
        ci = (measured.low, measured.high)
        said = verdict(ci, self.direction, self.threshold) if telling else "inconclusive"
        sign = "±" if self.direction == "within" else ""
        notes = " ".join(filter(None, (self.note, note)))
        direction = f"{self.direction} {sign}{self.threshold:g}"
        return Finding(self.claim, direction, measured.effect, ci, said, self.published, notes)


@dataclass(frozen=True)
class Claim:
    """One experiment of a paper at our scale.

    measure: (arm, seed, smoke) → JSON values; runs in a process of its own with one thread.
    after: arm → an earlier arm whose cell of the same seed must be measured first. Where any is given, `measure` also
    gets the folder of the cells, in which a cell may leave what later ones need.
    judge: all cells → one finding per expectation, in their order, made by `Expectation.judged`.
    figure: draws the picture to an SVG file. limits: what the result does not show, for the page.
    workers: cells measured at once; 1 where time is what is measured.
    """

    name: str
    paper: str
    title: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    smoke_seeds: tuple[int, ...]
    measure: Callable[..., dict[str, JSONValue]]
    expected: tuple[Expectation, ...]
    judge: Callable[[Cells], Sequence[Finding]]
    limits: str
    figure: Callable[[Cells, Path], None] | None = None
    workers: int = 2
    after: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.arms and self.seeds and self.smoke_seeds and self.expected):
            raise ConfigError(f"claim {self.name}: arms, seeds, smoke_seeds and expected must each name at least one")
        if max(self.seeds) >= DEVELOPMENT_SEEDS or min(self.smoke_seeds) < DEVELOPMENT_SEEDS:
            raise ConfigError(
                f"claim {self.name}: seeds {self.seeds}, smoke_seeds {self.smoke_seeds}: seeds that judge are below "
                f"{DEVELOPMENT_SEEDS}, those of smoke tests and development from there on, so that they never meet"
            )

        for arm, first in self.after.items():
            if arm not in self.arms or first not in self.arms[: self.arms.index(arm)]:
                raise ConfigError(f"claim {self.name}: after: {arm} waits for {first}, which is no earlier arm of it")

    def findings(self, cells: Cells) -> list[Finding]:
        """What `judge` says, held against what was expected beforehand."""
        found = list(self.judge(cells))
        said = [(finding.claim, finding.direction.split()[0]) for finding in found]
        wanted = [(expectation.claim, expectation.direction) for expectation in self.expected]
        assert said == wanted, f"judge of {self.name} answers {said}, expected {wanted}"
        return found
