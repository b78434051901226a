"""Where metrics are shown besides `metrics.jsonl`: TensorBoard, Weights & Biases, Trackio."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from bloomery.artifact import Output
from bloomery.errors import ConfigError


def require(names: Sequence[str]) -> None:
    """Raises `ConfigError` with the install line when a tracker that was asked for is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"trackers: {name} is not installed; run `pip install {name}`, or take it off the list")


class Trackers:
    """All trackers of one run. `log` goes to each of them; leaving the context closes them."""

    def __init__(self, names: Sequence[str], output: Output, first_step: int):
        require(names)
        self._open: list[Any] = [_OPEN[name](output, first_step) for name in names]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        for tracker in self._open:
            tracker.log(step, values)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._open:
            tracker.close()


class _TensorBoard:
    def __init__(self, output: Output, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output.path / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Hosted:
    """wandb, and trackio, which speaks the same language."""

    def __init__(self, module: Any, **settings: Any):
        self.run = module.init(project="bloomery", **settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _wandb(output: Output, _: int) -> _Hosted:
    import wandb

    return _Hosted(wandb, name=output.path.name, dir=str(output.path), id=output.key, resume="allow")


def _trackio(output: Output, _: int) -> _Hosted:
    import trackio

    return _Hosted(trackio, name=f"{output.path.name}-{output.key[:8]}", resume="allow")


_OPEN = {"tensorboard": _TensorBoard, "wandb": _wandb, "trackio": _trackio}
