"""Which prompts come next: each once an epoch in an order of its own, by difficulty, without what is solved."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from bloomery.data.permutation import key, permute
from bloomery.data.prompts import Prompt
from bloomery.errors import ConfigError
from bloomery.posttrain.curate import PassRate, unsolved
from bloomery.posttrain.rl_config import Sampling


class AllSolved(Exception):
    """No prompt is left: every one has been solved, and the stage is done."""


class Curriculum:
    """Draws prompts, by their positions in `prompts`.

    drop_solved: pass rate in one epoch from which a prompt is left out of all later ones; `None`: none is.
    rates: pass rates by prompt id known before the run; those of the run take their place.

    All that changes is in `progress`, a mapping of JSON values that the caller keeps: a run resumed with it draws the
    same prompts again. It holds `prompts_drawn`, `epoch`, `place` in it, its `pool` (positions, or null for all
    prompts), the `phase` it was made for, and by position the right and judged completions when it was last drawn.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, drop_solved: float | None = None,
        rates: Mapping[str, PassRate] | None = None,
    ):  # fmt: skip
        self.prompts, self.seed, self.drop_solved = prompts, seed, drop_solved
        known = rates or {}
        self._before = {i: known[prompt.id] for i, prompt in enumerate(prompts) if prompt.id in known}

    def take(self, count: int, phase: Sampling, progress: MutableMapping[str, Any]) -> list[int]:
        """The next `count` positions. Raises `AllSolved`, and `ConfigError` where none is of the phase's difficulty.

        A new phase begins a new epoch, since its prompts are others.
        """
        if progress.setdefault("phase", phase.number) != phase.number:
            progress["phase"] = phase.number
            self._begin_epoch(phase, progress)
        elif "epoch" not in progress:
            self._begin_epoch(phase, progress)
        taken: list[int] = []
        while len(taken) < count:
            if progress["place"] == self.size(progress):
                self._begin_epoch(phase, progress)
            taken += self._from_epoch(count - len(taken), progress)
        progress["prompts_drawn"] = progress.get("prompts_drawn", 0) + count
        return taken

    def left(self, phase: Sampling, progress: MutableMapping[str, Any]) -> int:
        """Prompts of the epoch that are still to come; an epoch that has none is over. Raises as `take` does."""
        self.take(0, phase, progress)
        if progress["place"] == self.size(progress):
            self._begin_epoch(phase, progress)
        return self.size(progress) - progress["place"]

    def metrics(self, progress: Mapping[str, Any]) -> dict[str, float]:
        """How far the epoch is, and where prompts are left out, how many it has."""
        found: dict[str, float] = {"epoch": progress["epoch"] + progress["place"] / self.size(progress)}
        return found if progress["pool"] is None else found | {"prompts_left": self.size(progress)}

    def size(self, progress: Mapping[str, Any]) -> int:
        """Prompts of the epoch."""
        return len(self.prompts) if progress["pool"] is None else len(progress["pool"])

    def record(self, position: int, right: int, judged: int, progress: MutableMapping[str, Any]) -> None:
        """`right` of `judged` completions of a prompt: its pass rate from now on. Nothing where none was judged."""
        if judged:
            progress.setdefault("rates", {})[str(position)] = (right, judged)

    def _begin_epoch(self, phase: Sampling, progress: MutableMapping[str, Any]) -> None:
        progress["epoch"] = progress["epoch"] + 1 if "epoch" in progress else 0
        progress["place"] = 0
        rates = {position: PassRate(*counts) for position, counts in progress.get("rates", {}).items()}
        left = [str(position) for position in range(len(self.prompts))]
        if self.drop_solved is not None:
            left = unsolved(left, rates, self.drop_solved)
        if not left:
            raise AllSolved
        pool = [int(position) for position in left if self._fits(rates.get(position), int(position), phase)]
        if not pool:
            raise ConfigError(
                f"phases.{phase.number}: none of {len(left)} prompts has a pass rate above {phase.above or 0:g} and at "
                f"most {phase.at_most:g}; widen the range, or give prompts that are as hard"
            )
        progress["pool"] = None if len(pool) == len(self.prompts) else pool

    def _fits(self, found: PassRate | None, position: int, phase: Sampling) -> bool:
        """Whether a prompt is of the phase's difficulty, what guessing explains taken off. An unknown one is."""
        known = found or self._before.get(position)
        if known is None:
            return True
        rate = known.beyond_chance(self.prompts[position].options)
        return (phase.above is None or rate > phase.above) and rate <= phase.at_most

    def _from_epoch(self, most: int, progress: MutableMapping[str, Any]) -> list[int]:
        """Up to `most` positions from where the epoch stands."""
        size, pool = self.size(progress), progress["pool"]
        slots = np.arange(progress["place"], min(size, progress["place"] + most))
        order = permute(slots, size, key(self.seed, "prompts", np.full(len(slots), progress["epoch"]))).tolist()
        progress["place"] += len(order)
        return order if pool is None else [pool[slot] for slot in order]
