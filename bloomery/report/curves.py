"""Curves of a stage's `metrics.jsonl`, as data for plotly: one small picture per question."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bloomery.report import quantities
from bloomery.report.run import Stage

MAX_POINTS = 1_000
_SMOOTH_FROM = 40
_FEW = 2
_NOT_CURVES = {"step", "tokens", "seconds", "position", "time", "epoch"}


@dataclass(frozen=True)
class Panel:
    """Which series share a picture: those of these names, and the parts `name/part` of a name in `parts_of`."""

    title: str
    unit: str
    names: tuple[str, ...] = ()
    parts_of: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        """Whether a series of this name belongs here."""
        return name in self.names or any(name.startswith(f"{whole}/") for whole in self.parts_of)


_REWARD = Panel("Reward and accuracy", "share", ("reward", "accuracy", "validation_accuracy"))
_REST = (
    Panel("Accuracy by part", "share", parts_of=("accuracy",)),
    Panel("Accuracy by source", "share", parts_of=("source_accuracy",)),
    Panel("Beyond chance", "accuracy − 1/options", parts_of=("beyond_chance",)),
    Panel("Reward by domain", "", parts_of=("reward",)),
    Panel("Form kept", "share of answers", ("format", "accuracy_malformed"), ("format",)),
    Panel("Entropy", "nats per token", ("entropy",)),
    Panel(
        "Answer length", "tokens", ("completion_tokens", "length", "max_new_tokens"), ("completion_tokens", "length")
    ),
    Panel("Answer length by domain", "tokens", parts_of=("domain_tokens",)),
    Panel("Gradient norm", "", ("grad_norm",)),
    Panel("Learning rate", "", ("learning_rate",)),
    Panel("FP8: flushed to zero", "share of numbers that are not zero", parts_of=("fp8_flushed",)),
    Panel("FP8: saturated", "share of numbers", parts_of=("fp8_saturated",)),
    Panel("Verdicts", "share of samples", ("truncated",), ("status",)),
    Panel("Groups without signal", "share of groups", ("groups_all_wrong", "groups_all_right")),
    Panel("Groups without signal by domain", "share of groups", parts_of=("degenerate",)),
    Panel("Blend as drawn", "share of prompts", parts_of=("share",)),
    Panel("Blend with signal", "share of groups", parts_of=("active_share",)),
    Panel("Blend as learnt", "share of groups", parts_of=("learnt_share",)),
    Panel("Say in the step", "share of Σ m·|A|", parts_of=("gradient_share",)),
    Panel("Trainer against generator", "nats per token", ("logprob_gap", "logprob_gap_max")),
    Panel("Held back", "share of tokens", ("clipped",)),
    Panel("Weight of samples", "π trainer / π generator", ("mismatch_weight",)),
    Panel("Distance from the first model", "nats per token", ("reference_kl",)),
    Panel("Draws", "of a step", ("redrawn", "groups_missing")),
    Panel("Prompts in the epoch", "prompts", ("prompts_left",)),
    Panel("Rollouts", "seconds", ("decode_seconds", "reward_seconds", "reward_wait_seconds")),
    Panel("One verdict", "seconds", ("verdict_p50_seconds", "verdict_p99_seconds")),
)
PANELS = (
    Panel("Loss", "nats per token", ("loss", "validation_loss")),
    Panel("Loss by source", "nats per token", parts_of=("loss",)),
    Panel("Validation loss by source", "nats per token", parts_of=("validation_loss",)),
    _REWARD,
    *_REST,
)
REWARDED = (_REWARD, *_REST, Panel("Policy loss", "", ("loss",)))
"""With a reward, that is the question, and the loss is only a surrogate whose value says little."""

Series = dict[str, tuple[list[int], list[float]]]
"""Name → (steps, values)."""


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
    """Known panels first, then every other series on its own. A panel of parts needs two of them to say anything."""
    series = _series(stage)
    panels = REWARDED if any(_REWARD.holds(name) for name in series) else PANELS
    groups = {panel: {name: points for name, points in series.items() if panel.holds(name)} for panel in panels}
    rest = sorted(series.keys() - {name for group in groups.values() for name in group})
    singles = {Panel(quantities.words(name).capitalize(), "", (name,)): {name: series[name]} for name in rest}
    main = [
        _picture(stage, panel, group, True)
        for panel, group in groups.items()
        if _is_curve(group) and (panel.names or len(group) > 1)
    ]
    return main + [_picture(stage, panel, single, False) for panel, single in singles.items() if _is_curve(single)]


def _is_curve(group: Series) -> bool:
    """At least one series has a second point."""
    return any(len(steps) > 1 for steps, _ in group.values())


def _series(stage: Stage) -> Series:
    """Every numeric series with its finite points, in order of appearance; throughput is added."""
    found: Series = {}
    for row in stage.metrics:
        for name, value in (*row.items(), *_throughput(row)):
            if name not in _NOT_CURVES and isinstance(value, int | float) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row.get("step", len(steps)))
                values.append(float(value))
    return found


def _throughput(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    if row.get("tokens") and row.get("seconds") and "tokens_per_second" not in row:
        yield "tokens_per_second", row["tokens"] / row["seconds"]


def _picture(stage: Stage, panel: Panel, series: Series, is_main: bool) -> Picture:
    few = len(series) <= _FEW
    labels = {name: quantities.words(name.partition("/")[2] or name) for name in series}
    traces = [
        trace
        for color, (name, points) in enumerate(series.items())
        for trace in _traces(labels[name], *points, color, smooth=name != "learning_rate", keep_raw=few)
    ]
    ends = [f"{labels[name]} {_ends(values)}" for name, (_, values) in series.items()]
    steps = quantities.grouped(max(points[0][-1] for points in series.values()))
    caption = f"{'; '.join(ends)}, over {steps} steps"
    identity = f"curve-{stage.name}-{panel.title}".lower().replace(" ", "-").replace("/", "-")
    return Picture(identity, panel.title, panel.unit, tuple(traces), caption, is_main)


def _ends(values: Sequence[float]) -> str:
    return " → ".join(quantities.number(value) for value in (values if len(values) == 1 else (values[0], values[-1])))


def _traces(
    label: str, steps: list[int], values: list[float], color: int, smooth: bool, keep_raw: bool
) -> list[dict[str, Any]]:
    """A long series as its running mean, with the raw points faint behind it where the picture has room."""
    stride = math.ceil(len(steps) / MAX_POINTS)
    shown = {"x": steps[::stride], "name": label, "color": color}
    raw = [_short(value) for value in values[::stride]]
    if not smooth or len(values) < _SMOOTH_FROM:
        return [{**shown, "y": raw, "role": "line"}]
    mean = [_short(value) for value in running_mean(values, max(3, len(values) // 25))[::stride]]
    return [*([{**shown, "y": raw, "role": "raw"}] if keep_raw else []), {**shown, "y": mean, "role": "line"}]


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
