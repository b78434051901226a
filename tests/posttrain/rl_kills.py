"""Runs the stage `rl` once undisturbed and once for each moment at which SIGKILL can hit it, then resumes it.

`python rl_kills.py CONFIG FOLDER MOMENT...` leaves FOLDER/calm and FOLDER/{moment}; prints the moments that did hit.
Every run is a fork of this process, which has done nothing but imports.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bloomery import config as configs
from bloomery.generate import Engine
from bloomery.posttrain import rl
from bloomery.posttrain.policy import PolicyGradient
from bloomery.posttrain.rl_config import RLConfig
from bloomery.posttrain.rollouts import _Clock
from bloomery.verify import VERIFIERS, Verdict


def starts_with_digit(completion: str, gold: str, require_think: bool = False) -> Verdict:
    """A task that an untrained model can learn in a few steps: write a digit first."""
    return Verdict.of("correct" if completion[:1].isdigit() or completion.startswith("\\boxed") else "wrong")


def die() -> None:
    """The end of the process, with nothing said."""
    os.kill(os.getpid(), signal.SIGKILL)


def after(count: int, function: Callable[..., Any], when: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """`function`, which dies instead at its call number `count` of those for which `when` holds."""
    calls = iter(range(1, 1_000_000))

    def called(*args: Any, **kwargs: Any) -> Any:
        if when(*args) and next(calls) == count:
            die()
        return function(*args, **kwargs)

    return called


def is_checkpoint(_: Any, target: Any) -> bool:
    """Whether a rename puts a checkpoint in its place."""
    return "checkpoints" in Path(target).parts


def is_traces(_: Any, target: Any) -> bool:
    """Whether a rename puts stored rollouts in their place."""
    return "rollouts-" in Path(target).name


def arm(moment: str) -> None:
    """Have this process die at the moment, in one of the six steps or at a checkpoint between them."""
    if moment == "rollout":
        Engine._post = after(12, Engine._post)  # type: ignore[method-assign]
    elif moment == "reward":
        _Clock.written = after(4, _Clock.written)  # type: ignore[method-assign]
    elif moment == "update":
        PolicyGradient.__call__ = after(4, PolicyGradient.__call__)  # type: ignore[method-assign]
    elif moment == "save":
        os.replace = after(2, os.replace, is_checkpoint)
    elif moment == "store":
        os.replace = after(1, os.replace, is_traces)


def run(config: Path, out: Path, moment: str) -> int:
    """The wait status of a fork that runs the stage, armed."""
    child = os.fork()
    if child == 0:
        VERIFIERS["answer"] = starts_with_digit
        rl.self_test = lambda verifiers: None  # type: ignore[attr-defined]
        arm(moment)
        rl.run(configs.load(RLConfig, config), out)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(config: Path, folder: Path, moments: list[str]) -> None:
    """Print, for every moment, how the first and the second run ended."""
    ended = {"calm": [run(config, folder / "calm", "")]}
    for moment in moments:
        ended[moment] = [run(config, folder / moment, moment), run(config, folder / moment, "")]
    sys.stdout.write(json.dumps(ended) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
