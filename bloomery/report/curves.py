"""Curves of a stage's `metrics.jsonl`, as data for plotly: one small picture per question."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bloomery.report import quantities
from bloomery.report.run import Stage

MAX_POINTS = 1_000
_SMOOTH_FROM = 40
_NOT_CURVES = {"step", "tokens", "seconds", "position", "time", "epoch"}


@dataclass(frozen=True)
class Panel:
    """Which series share a picture: these names, and names that start with one of them and `/`."""

    title: str
    unit: str
    names: tuple[str, ...]


_REWARD = Panel("Reward and accuracy", "share", ("reward", "accuracy", "validation_accuracy", "score"))
_REST = (
    Panel("Entropy", "nats per token", ("entropy",)),
    Panel("Answer length", "tokens", ("length", "completion_tokens", "response_length", "mean_length")),
    Panel("Gradient norm", "", ("grad_norm", "gradient_norm")),
    Panel("Learning rate", "", ("learning_rate",)),
    Panel("Verdicts", "share of samples", ("status", "truncated")),
    Panel("Groups without signal", "share", ("groups_all_wrong", "groups_all_right")),
)
PANELS = (Panel("Loss", "nats per token", ("loss", "validation_loss", "train_loss")), _REWARD, *_REST)
REWARDED = (_REWARD, *_REST, Panel("Policy loss", "", ("loss",)))
"""With a reward, that is the question, and the loss is only a surrogate whose value says little."""


@dataclass(frozen=True)
class Picture:
    """One picture: plotly traces, and the words that say the same."""

    id: str
    title: str
    unit: str
    traces: tuple[dict[str, Any], ...]
    caption: str
    is_main: bool


def pictures(stage: Stage) -> list[Picture]:
    """Known panels first, then every other series on its own."""
    series = _series(stage)
    panels = REWARDED if any(_belongs(name, _REWARD) for name in series) else PANELS
    groups = {panel: {name: points for name, points in series.items() if _belongs(name, panel)} for panel in panels}
    rest = sorted(series.keys() - {name for group in groups.values() for name in group})
    singles = {Panel(quantities.words(name).capitalize(), "", (name,)): {name: series[name]} for name in rest}
    main = [_picture(stage, panel, group, True) for panel, group in groups.items() if group]
    return main + [_picture(stage, panel, single, False) for panel, single in singles.items()]


def _series(stage: Stage) -> dict[str, tuple[list[int], list[float]]]:
    """Every numeric series with at least two finite points, in order of appearance; throughput is added."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in stage.metrics:
        for name, value in (*row.items(), *_throughput(row)):
            if name not in _NOT_CURVES and isinstance(value, int | float) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row.get("step", len(steps)))
                values.append(float(value))
    return {name: points for name, points in found.items() if len(points[0]) > 1}


def _throughput(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    tokens, seconds = row.get("tokens"), row.get("seconds")
    if (
        "tokens_per_second" not in row
        and isinstance(tokens, int | float)
        and isinstance(seconds, int | float)
        and seconds
    ):
        yield "tokens_per_second", tokens / seconds


def _belongs(name: str, panel: Panel) -> bool:
    return name in panel.names or any(name.startswith(f"{known}/") for known in panel.names)


def _picture(stage: Stage, panel: Panel, series: dict[str, tuple[list[int], list[float]]], is_main: bool) -> Picture:
    traces = [trace for index, (name, points) in enumerate(series.items()) for trace in _traces(name, *points, index)]
    ends = [f"{quantities.words(name)} {_ends(values)}" for name, (_, values) in series.items()]
    steps = max(points[0][-1] for points in series.values())
    caption = f"{'; '.join(ends)}, over {quantities.grouped(int(steps))} steps"
    identity = f"curve-{stage.name}-{panel.title}".lower().replace(" ", "-").replace("/", "-")
    return Picture(identity, panel.title, panel.unit, tuple(traces), caption, is_main)


def _ends(values: Sequence[float]) -> str:
    return f"{quantities.number(values[0])} → {quantities.number(values[-1])}"


def _traces(name: str, steps: list[int], values: list[float], color: int) -> list[dict[str, Any]]:
    """The series; a long noisy one as a faint line with its running mean on top."""
    stride = math.ceil(len(steps) / MAX_POINTS)
    label = quantities.words(name)
    raw = {"x": steps[::stride], "y": [_short(value) for value in values[::stride]], "name": label, "color": color}
    if len(values) < _SMOOTH_FROM or name == "learning_rate":
        return [{**raw, "role": "line"}]
    smooth = [_short(value) for value in running_mean(values, max(3, len(values) // 25))[::stride]]
    return [{**raw, "role": "raw"}, {**raw, "y": smooth, "role": "line"}]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` points, narrower at both ends so that it is never shifted."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    result = []
    for index in range(len(values)):
        half = min(window // 2, index, len(values) - 1 - index)
        result.append((sums[index + half + 1] - sums[index - half]) / (2 * half + 1))
    return result


def _short(value: float) -> float:
    return float(f"{value:.5g}")
