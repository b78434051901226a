"""How many prompts of which kind stand in each step: shares over domains, forms and sources, kept exactly.

The blends of Nemotron-CrossThink (arXiv 2504.13941, section 2.4): shares go to groups, and inside a group to its
datasets by size, by a score, or by how hard they are.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from pydantic import model_validator

from bloomery.config import Config, Field
from bloomery.data.plan import check_weights
from bloomery.data.prompts import Prompt
from bloomery.errors import ConfigError

OTHERS = "others"
"""Among shares: all groups that are not named, together."""

_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples fill [0, 1) evenly, so that counts rounded step by step add up right
Cell = tuple[str, str]
"""(group, source) of a prompt: what has a weight and a stream of its own."""


class PromptBlend(Config):
    """Shares of a step's prompts."""

    by: Literal["domain", "form", "source"] = Field(
        default="domain", description="what the groups are: domains, forms (choice, open) or sources"
    )
    shares: dict[str, float] = Field(
        default={}, description="group → share of the prompts, relative to the other shares; `others`: all groups not "
        "named, together; a group left out has none. Empty: one group of all",
    )  # fmt: skip
    scores: dict[str, float] = Field(
        default={}, description="source → weight inside its group, such as the score that training on it alone gives; "
        "its number of prompts where none are given",
    )  # fmt: skip
    difficulty: bool = Field(
        default=False, description="inside a group, weight each source by its prompts' 1 − pass rate, from `rollouts`"
    )
    exhausted: Literal["repeat", "renormalise"] = Field(
        default="repeat", description="a source that was gone through begins again, or leaves its share to the others "
        "until all were",
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_weight(self) -> Self:
        if self.scores and self.difficulty:
            raise ValueError("difficulty: has no effect beside scores; keep one of the two")
        for name, weights in (("shares", self.shares), ("scores", self.scores)):
            if weights:
                try:
                    check_weights(weights, name)
                except ConfigError as error:
                    raise ValueError(str(error)) from None
        return self

    def group(self, prompt: Prompt) -> str:
        """The group of a prompt by `by`; `others` where shares name others but not its own."""
        own = {"domain": prompt.domain, "form": prompt.form, "source": prompt.source}[self.by]
        return OTHERS if own not in self.shares and OTHERS in self.shares else own


def cells(prompts: Sequence[Prompt], blend: PromptBlend) -> dict[Cell, list[int]]:
    """The positions of the prompts of each cell that has a share. Raises `ConfigError` naming a share of nothing."""
    found: dict[Cell, list[int]] = {}
    for position, prompt in enumerate(prompts):
        found.setdefault((blend.group(prompt), prompt.source), []).append(position)
    groups, sources = {group for group, _ in found}, {source for _, source in found}
    for name in blend.shares:
        if blend.shares[name] and name not in groups:
            raise ConfigError(f"blend.shares.{name}: no prompt of it; {blend.by}s found: {', '.join(sorted(groups))}")
    for name in blend.scores:
        if name not in sources:
            raise ConfigError(f"blend.scores.{name}: no such source; found: {', '.join(sorted(sources))}")
    used = {cell: positions for cell, positions in found.items() if not blend.shares or blend.shares.get(cell[0])}
    missing = sorted({source for _, source in used} - blend.scores.keys()) if blend.scores else []
    if missing:
        raise ConfigError(f"blend.scores.{missing[0]}: missing; every source needs one, 0 leaves it out")
    return {cell: positions for cell, positions in used.items() if not blend.scores or blend.scores[cell[1]]}


def weights(found: Mapping[Cell, Sequence[int]], blend: PromptBlend, hardness: Sequence[float] = ()) -> np.ndarray:
    """(cells,) shares of the prompts, summing to 1: w = s_k · v / Σ v over the group k, v the cell's size, its score,
    or the sum of its prompts' `hardness` (prompts,). Raises `ConfigError` where a group has no weight at all."""
    inner = {cell: _value(cell, positions, blend, hardness) for cell, positions in found.items()}
    totals: dict[str, float] = {}
    for (group, _), value in inner.items():
        group = group if blend.shares else OTHERS
        totals[group] = totals.get(group, 0.0) + value
    empty = [group for group, total in totals.items() if not total]
    if empty or not inner:
        raise ConfigError(f"blend: nothing in {', '.join(empty) or 'it'} has a weight; give scores, or harder prompts")
    shares = blend.shares or {OTHERS: 1.0}
    whole = sum(shares[group] for group in totals)
    groups = [group if blend.shares else OTHERS for group, _ in inner]
    return np.array([shares[g] / whole * v / totals[g] for g, v in zip(groups, inner.values(), strict=True)])


def _value(cell: Cell, positions: Sequence[int], blend: PromptBlend, hardness: Sequence[float]) -> float:
    if blend.difficulty:
        return math.fsum(hardness[position] for position in positions)
    return blend.scores[cell[1]] if blend.scores else len(positions)


@dataclass(frozen=True)
class Systematic:
    """Which counts each step has: `count` prompts over cells with `weights`, which sum to 1.

    Systematic sampling (Madow and Madow 1944): equally spaced points over the weights laid end to end, so that a step
    holds count · w ± 1 of each cell, whatever the shares. The first point moves by the golden ratio from step to step:
    over n steps the counts differ from n · count · w by a few, and step n needs no memory of those before.
    """

    weights: np.ndarray
    count: int
    seed: int

    def counts(self, step: int) -> np.ndarray:
        """(cells,) int64 prompts of step `step`, counted from 0; they sum to `count`."""
        return self._counts(np.array([step]))[0]

    def before(self, step: int) -> np.ndarray:
        """(cells,) int64 prompts of all steps before `step`."""
        return self._counts(np.arange(step)).sum(axis=0)

    def _counts(self, steps: np.ndarray) -> np.ndarray:
        start = int.from_bytes(hashlib.blake2b(f"{self.seed}".encode(), digest_size=6).digest(), "little") / 2**48
        first = (start + steps[:, None] * _GOLDEN) % 1
        ends = self.count * np.cumsum(self.weights)
        ends[-1] = self.count
        placed = np.ceil(ends - first).astype(np.int64)
        return np.diff(placed, axis=1, prepend=0)


def interleaved(counts: Sequence[int]) -> list[int]:
    """Cell of each prompt of a step, spread evenly: any part of it has about the shares of the whole."""
    places = [((k + 0.5) / count, cell) for cell, count in enumerate(counts) for k in range(count)]
    return [cell for _, cell in sorted(places)]
