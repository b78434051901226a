"""Which prompts come next, and rollouts of them by the current weights: the same again after a resume."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bloomery.data.document import Drops
from bloomery.data.permutation import key, permute
from bloomery.data.prompts import Prompt
from bloomery.errors import ArtifactError, DivergenceError
from bloomery.generate import Engine, SamplingParams
from bloomery.posttrain.rollouts import Rollouts, require_judged, roll_out
from bloomery.verify import Pool, echo

_DRAWN = "prompts_drawn"


class Sampler:
    """Rolls out `num_prompts` × `group_size` completions at a time.

    max_redraws: draws without any signal that are passed over in a row; max_unjudged: largest share of completions
    without a verdict. `latest` holds the last rollouts.
    """

    def __init__(
        self, engine: Engine, pool: Pool, prompts: Sequence[Prompt], num_prompts: int, group_size: int,
        params: SamplingParams, seed: int, max_redraws: int, max_unjudged: float,
    ):  # fmt: skip
        self.engine, self.pool, self.prompts = engine, pool, prompts
        self.num_prompts, self.group_size, self.params, self.seed = num_prompts, group_size, params, seed
        self.max_redraws, self.max_unjudged = max_redraws, max_unjudged
        self.latest: Rollouts | None = None

    def draw(self, progress: dict[str, Any]) -> tuple[Rollouts, int]:
        """Rollouts in which some group has signal, and how many draws without any were passed over before.

        `progress` counts the prompts drawn; a run resumed with it draws the next ones and writes the same texts.
        Raises `DivergenceError` when `max_redraws` are used up: the optimizer has nothing to learn from.
        """
        for redrawn in range(self.max_redraws + 1):
            first = progress.get(_DRAWN, 0)
            chosen = in_order(self.prompts, first, self.num_prompts, self.seed)
            self.engine.sync()  # the weights may have changed since the last draw
            rollouts = roll_out(self.engine, self.pool, chosen, self.group_size, self.params, (self.seed, first))
            require_judged(rollouts, self.max_unjudged)
            progress[_DRAWN] = first + len(chosen)
            if rollouts.has_signal:
                self.latest = rollouts
                return rollouts, redrawn
        raise DivergenceError(
            f"in {self.max_redraws + 1} draws of {self.num_prompts} prompts no group had both right and wrong answers "
            f"(right in the last: {rollouts.metrics().get('accuracy', 0):.0%}), so there is nothing to learn; choose "
            "easier or harder prompts, a larger group_size, or a model whose answers vary more"
        )


def in_order(prompts: Sequence[Prompt], first: int, count: int, seed: int) -> list[Prompt]:
    """Draws `first` … `first + count` − 1: every prompt once an epoch, each epoch in an order of its own."""
    epochs, slots = np.divmod(np.arange(first, first + count), len(prompts))
    return [prompts[i] for i in permute(slots, len(prompts), key(seed, "prompts", epochs)).tolist()]


def winnable(prompts: Sequence[Prompt], pool: Pool, require_think: bool, drops: Drops) -> list[Prompt]:
    """Prompts whose own answer is judged right; any other could only ever punish, and is counted in `drops`.

    Raises `ArtifactError` when none is left.
    """
    thought = "</think>" if require_think else ""
    items = [(p.verifier, thought + echo(p.verifier, p.answer), p.answer) for p in prompts]
    kept = []
    for prompt, verdict in zip(prompts, pool.judge_all(items), strict=True):
        if verdict.status == "correct":
            kept.append(prompt)
        else:
            drops.add(f"its own answer is judged {verdict.status}", prompt.id)
    if not kept:
        raise ArtifactError(f"no prompt is left to train on; dropped: {drops}")
    return kept
