"""Pictures for the pages of claims, with matplotlib (extra `claims`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito: told apart by all eyes
Curve = np.ndarray
"""(points, 2): x and y."""


def curves(
    file: Path, panels: Mapping[str, Mapping[str, Sequence[Curve]]], x: str, log_x: bool = False, log_y: bool = False
) -> None:
    """Draw a panel for each quantity: for each arm the mean of its curves (one a seed, on the same x) and their range.

    panels: name of the quantity, which is written beside its axis → arm → curves. Raises `ModuleNotFoundError` without
    matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, arms) in zip(axes, panels.items(), strict=True):
        for color, (arm, members) in zip(_colors(len(arms)), arms.items(), strict=True):
            _draw(axis, arm, color, members)
        axis.set(xlabel=x, ylabel=name, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    axes[0].legend(frameon=False)
    save(figure, file)


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _draw(axis: Any, arm: str, color: str, members: Sequence[Curve]) -> None:
    stacked = np.stack([np.asarray(member, dtype=np.float64) for member in members])
    xs, ys = stacked[0, :, 0], stacked[:, :, 1]
    axis.plot(xs, ys.mean(0), color=color, label=arm, linewidth=1.6)
    axis.fill_between(xs, ys.min(0), ys.max(0), color=color, alpha=0.15, linewidth=0)


def save(figure: Any, file: Path) -> None:
    """Write an SVG; the same numbers give the same bytes: no date, no random ids."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": file.name, "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
