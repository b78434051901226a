"""Prompts of several domains, forms and sources in fixed shares, each source in an order of its own."""

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from bloomery.data.prompt_blend import Cell, PromptBlend, Systematic, cells, interleaved, weights
from bloomery.data.prompts import Prompt
from bloomery.errors import ConfigError
from bloomery.posttrain.curate import PassRate
from bloomery.posttrain.curriculum import AllSolved, Curriculum
from bloomery.posttrain.rl_config import RLConfig, Sampling


def open_curriculum(
    prompts: Sequence[Prompt], config: RLConfig, rates: Mapping[str, PassRate]
) -> "Curriculum | BlendedCurriculum":
    """The order in which a run draws its prompts. Raises `ConfigError` where the blend asks for what is not there."""
    if config.blend is None:
        return Curriculum(prompts, config.seed, config.drop_solved, rates)
    return BlendedCurriculum(prompts, config.blend, config.seed, config.drop_solved, rates)


class BlendedCurriculum:
    """A `Curriculum` for each cell of a blend; the counts of a step are those of systematic sampling.

    In `progress`: `draws`, the number of steps drawn, which with the seed decides all counts; under `cells`, by name,
    the progress of each curriculum; `ended`: the cells that take no part any more. Without `drop_solved` and phases the
    places in the cells follow from `draws` too.
    """

    def __init__(
        self, prompts: Sequence[Prompt], blend: PromptBlend, seed: int, drop_solved: float | None = None,
        rates: Mapping[str, PassRate] | None = None,
    ):  # fmt: skip
        self.prompts, self.blend, self.seed = prompts, blend, seed
        found = cells(prompts, blend)
        shares = weights(found, blend, _hardness(prompts, blend, rates or {}))
        self.cells = {
            _name(cell): own for (cell, own), share in zip(found.items(), shares.tolist(), strict=True) if share
        }
        self.weights = shares[shares > 0]
        self._groups = [group for (group, _), share in zip(found, shares.tolist(), strict=True) if share]
        self._places = {
            position: (name, place) for name, own in self.cells.items() for place, position in enumerate(own)
        }
        self._curricula = {
            name: Curriculum([prompts[position] for position in own], seed, drop_solved, rates)
            for name, own in self.cells.items()
        }

    def take(
        self, count: int, phase: Sampling, progress: MutableMapping[str, Any], groups: Collection[str] | None = None
    ) -> list[int]:
        """The next `count` positions, each part of them in about the shares of the whole. Raises `AllSolved` when no
        cell has a prompt left, and `ConfigError` where one has none of the phase's difficulty.

        groups: only of these, as long as one of them has prompts."""
        progress["phase"] = phase.number
        taken: dict[str, list[int]] = {name: [] for name in self.cells}
        while missing := count - sum(map(len, taken.values())):
            self._take_some(missing, phase, progress, taken, groups)
        progress["draws"] = progress.get("draws", 0) + 1
        progress["prompts_drawn"] = progress.get("prompts_drawn", 0) + count
        waiting = {name: iter(own) for name, own in taken.items()}
        names = list(self.cells)
        return [next(waiting[names[cell]]) for cell in interleaved([len(own) for own in taken.values()])]

    def _take_some(
        self, missing: int, phase: Sampling, progress: MutableMapping[str, Any], taken: dict[str, list[int]],
        groups: Collection[str] | None,
    ) -> None:  # fmt: skip
        """One round over the cells that take part; less than `missing` where one of them ends in it."""
        ended = progress.setdefault("ended", [])
        alive = np.array([name not in ended for name in self.cells])
        asked = alive & np.array([groups is None or group in groups for group in self._groups])
        alive = asked if asked.any() else alive
        shares = np.where(alive, self.weights, 0)
        counts = Systematic(shares / shares.sum(), missing, self.seed).counts(progress.get("draws", 0))
        for name, wanted in zip(self.cells, counts.tolist(), strict=True):
            if wanted:
                taken[name] += self._from_cell(name, wanted, phase, progress)

    def _from_cell(self, name: str, wanted: int, phase: Sampling, progress: MutableMapping[str, Any]) -> list[int]:
        own = progress.setdefault("cells", {}).setdefault(name, {})
        curriculum, positions = self._curricula[name], self.cells[name]
        try:
            if self.blend.exhausted == "renormalise":
                left = curriculum.left(phase, own)
                if left <= wanted:
                    self._end(name, progress)
                wanted = min(left, wanted)
            return [positions[place] for place in curriculum.take(wanted, phase, own)]
        except AllSolved:
            self._end(name, progress, solved=True)
            return []

    def _end(self, name: str, progress: MutableMapping[str, Any], solved: bool = False) -> None:
        """The cell takes no part any more. When none does, all that have prompts left begin again."""
        progress["ended"].append(name)
        if solved:
            progress.setdefault("solved", []).append(name)
        if len(progress["ended"]) == len(self.cells):
            progress["ended"] = list(progress.get("solved", []))
            if len(progress["ended"]) == len(self.cells):
                raise AllSolved

    def record(self, position: int, right: int, judged: int, progress: MutableMapping[str, Any]) -> None:
        """`right` of `judged` completions of a prompt: its pass rate from now on."""
        name, place = self._places[position]
        self._curricula[name].record(place, right, judged, progress["cells"][name])

    def metrics(self, progress: Mapping[str, Any]) -> dict[str, float]:
        """By cell the epochs gone through and the share of all prompts drawn."""
        found: dict[str, float] = {}
        for name, own in progress["cells"].items():
            inner = self._curricula[name].metrics(own)
            found |= {f"{metric}/{name}": value for metric, value in inner.items()}
            found[f"blend/{name}"] = own.get("prompts_drawn", 0) / progress["prompts_drawn"]
        return found


def _name(cell: Cell) -> str:
    group, source = cell
    return source if group == source else f"{group}.{source}"


def _hardness(prompts: Sequence[Prompt], blend: PromptBlend, rates: Mapping[str, PassRate]) -> list[float]:
    """1 − pass rate of each prompt, what guessing explains taken off; the mean of the others' where nobody knows."""
    if not blend.difficulty:
        return []
    known = [1 - rates[prompt.id].beyond_chance(prompt.options) if prompt.id in rates else None for prompt in prompts]
    found = [value for value in known if value is not None]
    if not found:
        raise ConfigError("blend.difficulty: no prompt has a pass rate; give rollouts of these prompts")
    mean = sum(found) / len(found)
    return [mean if value is None else value for value in known]
