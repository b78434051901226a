"""Evaluations before and after: every metric with its 95 % interval, and the paired change against the model before."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bloomery import artifact
from bloomery.errors import ArtifactError
from bloomery.evaluate import statistics
from bloomery.evaluate.statistics import Difference
from bloomery.report import quantities
from bloomery.report.run import Run, Stage, read_run

ALL = "all"
"""The task that an evaluation of several sources reports over all of them."""
TOKENS = "tokens_per_answer"
_ORDER = ("avg", "pass", "maj", "accuracy", "tokens")
_BETTER_UP = ("avg", "pass", "maj", "accuracy")
_DRAWS = 2_000


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation folder and the model it judged."""

    model: str
    stage: Stage

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """`report.json`: task, version, metric, value, stderr, n."""
        file = self.stage.path / artifact.REPORT
        rows = artifact.read_json(file)
        if not isinstance(rows, list) or not all(isinstance(r, dict) and {"task", "metric"} <= r.keys() for r in rows):
            raise ArtifactError(f"{file}: expected a list of {{task, metric, value, …}}; evaluate the model again")
        return rows

    @cached_property
    def samples(self) -> pa.Table | None:
        """`samples.parquet`, where it was kept."""
        file = self.stage.path / artifact.SAMPLES
        return pq.read_table(file) if file.is_file() else None

    @cached_property
    def problems(self) -> dict[str, dict[str, list[tuple[float | None, int]]]]:
        """Task → problem id → (score, tokens) of each of its samples."""
        found: dict[str, dict[str, list[tuple[float | None, int]]]] = {}
        if self.samples is not None:
            for row in self.samples.select(["task", "id", "score", "tokens"]).to_pylist():
                found.setdefault(row["task"], {}).setdefault(row["id"], []).append((row["score"], row["tokens"]))
        if len(found) > 1:
            everything = {f"{task}/{name}": each for task, part in found.items() for name, each in part.items()}
            found.setdefault(ALL, everything)
        return found


@dataclass(frozen=True)
class Cell:
    """One metric of one model on one task. `change` is against the previous model, on the same problems."""

    metric: str
    value: float
    low: float | None
    high: float | None
    change: Difference | None = None

    @property
    def is_share(self) -> bool:
        """A share of problems between 0 and 1, rather than a count such as tokens."""
        return "tokens" not in self.metric and 0 <= self.value <= 1

    @property
    def _scale(self) -> int:
        return 100 if self.is_share else 1

    @property
    def text(self) -> str:
        return quantities.percent(self.value) if self.is_share else quantities.number(self.value)

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        return f"{self._scale * self.low:.1f} – {self._scale * self.high:.1f}"

    @property
    def change_text(self) -> str:
        """The change itself, in points for a share."""
        return quantities.signed(self._scale * self.change.effect) if self.change else ""

    @property
    def change_interval(self) -> str:
        """Its 95 % interval."""
        if self.change is None:
            return ""
        low, high = (quantities.signed(self._scale * end) for end in (self.change.low, self.change.high))
        return f"{low} to {high}"

    @property
    def direction(self) -> str:
        """`better` or `worse` where the interval excludes 0, `moved` for metrics without a good side, else `same`."""
        if self.change is None or self.change.low <= 0 <= self.change.high:
            return "same"
        if not self.metric.startswith(_BETTER_UP):
            return "moved"
        return "better" if self.change.effect > 0 else "worse"


@dataclass(frozen=True)
class Row:
    """One model's results on one task; `cells` has None where a metric was not measured."""

    model: str
    evaluation: str
    problems: int
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Table:
    """One task: the models in the order of their life."""

    task: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def leading(self) -> tuple[int, ...]:
        """Positions of the metrics to show first: each family `metric@k` at its largest k, and tokens per answer."""
        largest = {metric.partition("@")[0]: index for index, metric in enumerate(self.metrics) if "@" in metric}
        tokens = [index for index, metric in enumerate(self.metrics) if metric == TOKENS]
        return tuple(sorted([*largest.values(), *tokens])) or tuple(range(len(self.metrics)))

    @property
    def others(self) -> tuple[int, ...]:
        """Positions of all other metrics."""
        return tuple(index for index in range(len(self.metrics)) if index not in self.leading)


def evaluations(run: Run) -> list[Evaluation]:
    """Finished evaluations, in the order in which their models came to be."""
    position = {stage.name: index for index, stage in enumerate(run.stages)}
    stages = [stage for stage in run.finished if (stage.path / artifact.REPORT).is_file()]
    found = [Evaluation(_judged(run, stage), stage) for stage in stages]
    return sorted(found, key=lambda each: (position.get(each.model, len(position)), position[each.stage.name]))


def _judged(run: Run, stage: Stage) -> str:
    models = [name for name in stage.sources if run.stage(name).family == "model"]
    return models[0] if models else stage.outside[0] if stage.outside else stage.name


def tables(found: list[Evaluation]) -> list[Table]:
    """One table per task, tasks in order of appearance."""
    tasks = dict.fromkeys(row["task"] for each in found for row in each.rows)
    return [_table(task, found) for task in tasks]


def _table(task: str, found: list[Evaluation]) -> Table:
    here = [each for each in found if any(row["task"] == task for row in each.rows)]
    metrics = tuple(sorted({row["metric"] for each in here for row in each.rows if row["task"] == task}, key=_rank))
    before = [None, *here[:-1]]
    return Table(task, metrics, tuple(_row(task, metrics, *pair) for pair in zip(before, here, strict=True)))


def _rank(metric: str) -> tuple[int, str, int]:
    family, _, k = metric.partition("@")
    known = [position for position, prefix in enumerate(_ORDER) if family.startswith(prefix)]
    return (known[0] if known else len(_ORDER), family, int(k) if k.isdigit() else 0)


def _row(task: str, metrics: tuple[str, ...], before: Evaluation | None, now: Evaluation) -> Row:
    rows = {row["metric"]: row for row in now.rows if row["task"] == task}
    cells = (_cell(rows[metric], _change(task, metric, before, now)) if metric in rows else None for metric in metrics)
    return Row(now.model, now.stage.name, max((row.get("n") or 0 for row in rows.values()), default=0), tuple(cells))


def _cell(row: Mapping[str, Any], change: Difference | None) -> Cell | None:
    value, stderr = row.get("value"), row.get("stderr")
    if value is None:
        return None
    if stderr is None:
        return Cell(row["metric"], value, None, None, change)
    low, high = value - statistics.Z95 * stderr, value + statistics.Z95 * stderr
    if "tokens" not in row["metric"] and 0 <= value <= 1:
        low, high = max(0.0, low), min(1.0, high)
    return Cell(row["metric"], value, low, high, change)


def _change(task: str, metric: str, before: Evaluation | None, now: Evaluation) -> Difference | None:
    """Paired on the problems that both models answered; None where the samples cannot tell."""
    if before is None:
        return None
    old, new = (_per_problem(metric, each.problems.get(task, {})) for each in (before, now))
    return statistics.paired_difference(old, new, draws=_DRAWS) if old.keys() & new.keys() else None


def _per_problem(metric: str, problems: Mapping[str, list[tuple[float | None, int]]]) -> dict[str, float]:
    family, _, k = metric.partition("@")
    if metric == TOKENS:
        return {name: sum(tokens for _, tokens in samples) / len(samples) for name, samples in problems.items()}
    judged = {name: [score for score, _ in samples if score is not None] for name, samples in problems.items()}
    judged = {name: scores for name, scores in judged.items() if scores}
    if family in ("avg", "accuracy"):
        return {name: sum(scores) / len(scores) for name, scores in judged.items()}
    if family == "pass" and k.isdigit():
        return {
            name: statistics.pass_at_k(sum(score >= 1 for score in scores), len(scores), int(k))
            for name, scores in judged.items()
            if len(scores) >= int(k)
        }
    return {}


@dataclass(frozen=True)
class Headline:
    """A task's first number, from the first model to the last. `first` is None where one model was evaluated."""

    task: str
    models: tuple[str, ...]
    first: Cell | None
    last: Cell


def headlines(found: list[Evaluation]) -> list[Headline]:
    """One per task: its leading metric, with the paired change over the whole life."""
    made = []
    for table in tables(found):
        metric, rows = table.metrics[0], [row for row in table.rows if row.cells[0]]
        if not rows:
            continue
        first, last = (next(each for each in found if each.stage.name == row.evaluation) for row in (rows[0], rows[-1]))
        end = rows[-1].cells[0]
        assert end is not None
        if first is last:
            made.append(Headline(table.task, (last.model,), None, end))
        else:
            end = dataclasses.replace(end, change=_change(table.task, metric, first, last))
            made.append(Headline(table.task, (first.model, last.model), rows[0].cells[0], end))
    return made


def results_table(folder: Path) -> str:
    """The leading metrics as plain text for a terminal; empty where nothing was evaluated."""
    return "\n".join("\n".join(_lines(table)) + "\n" for table in tables(evaluations(read_run(folder))))


def _lines(table: Table) -> Iterator[str]:
    """The first leading metric with interval and paired change, of the others the values: it fits a terminal."""
    first, *others = table.leading
    names = [table.metrics[index].removesuffix("_per_answer") for index in others]
    grid = [[table.task, table.metrics[first], "change", *names]]
    for row in table.rows:
        values = [cell.text if (cell := row.cells[index]) else "–" for index in others]
        grid.append([row.model, *_with_change(row.cells[first]), *values])
    widths = [max(len(line[column]) for line in grid) for column in range(len(grid[0]))]
    for line in grid:
        cells = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        yield "  ".join([line[0].ljust(widths[0]), *cells]).rstrip()


def _with_change(cell: Cell | None) -> tuple[str, str]:
    if cell is None:
        return "–", ""
    interval = f" [{cell.interval}]" if cell.interval else ""
    return f"{cell.text}{interval}", f"{cell.change_text} ({cell.change_interval})" if cell.change else ""
