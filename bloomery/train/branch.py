"""Going on from a point of another run, its trunk: weights, optimizer, schedule and data as if it had never ended.

A learning rate that is constant until it decays (warm-up, stable, decay: Hägele et al. 2024, arXiv 2405.18392) makes
every checkpoint of the stable part a point from which many second phases can branch.
"""

from pathlib import Path

from bloomery import artifact
from bloomery import config as configs
from bloomery.config import Config
from bloomery.errors import ArtifactError, ConfigError
from bloomery.progress import say
from bloomery.train.checkpoint import Checkpoints
from bloomery.train.loop import LoopConfig, TrainState, rate_at

_SCHEDULE = ("max_steps", "schedule", "warmup_steps", "decay_fraction", "min_ratio", "learning_rate")


def load_trunk(trunk: Path, step: int | None, state: TrainState, loop: LoopConfig) -> None:
    """Restore into `state` the trunk's checkpoint after `step`, its last where not given.

    Raises `ArtifactError` when there is none, and `ConfigError` where this run would not have come the same way.
    """
    with Checkpoints(trunk / artifact.CHECKPOINTS) as checkpoints:
        checkpoints.load(state, step)
    _refuse_another_way(trunk, _loop_of(trunk), loop, state.step)
    say(f"pretrain  goes on from {trunk} after step {state.step}, at sequence {state.position}")


def _loop_of(trunk: Path) -> LoopConfig:
    try:
        return configs.build(LoopConfig, configs.read_yaml(trunk / artifact.CONFIG)["loop"], "loop")
    except (ConfigError, KeyError) as error:
        raise ArtifactError(f"{trunk}: not a stage that trained: {error}; give a folder of stage pretrain") from None


def _refuse_another_way(trunk: Path, before: LoopConfig, now: LoopConfig, step: int) -> None:
    if now.max_steps <= step:
        raise ConfigError(f"loop.max_steps: {now.max_steps}, but the trunk has made {step} steps; give more")
    ours, theirs = _settings(now), _settings(before)
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ConfigError(f"loop.{name}: {value!r}, the trunk {trunk} had {theirs.get(name)!r}; give the same")
    for number in range(1, step + 1):
        if abs(rate_at(number, before) - rate_at(number, now)) > 1e-12:
            raise ConfigError(
                f"loop: the learning rate of step {number} is {rate_at(number, now):.4g} here and was "
                f"{rate_at(number, before):.4g} in the trunk {trunk}; branch before its decay (trunk_step), or "
                "give the trunk schedule: constant"
            )


def _settings(loop: Config) -> dict[str, object]:
    """What both must share beside the learning rates."""
    found = configs.flatten(configs.identity(loop))
    return {name: value for name, value in found.items() if name not in _SCHEDULE}
