"""What a stage's folder says for itself: sizes of its model, rows of its data, headline numbers of its summary."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from bloomery import artifact
from bloomery.errors import ArtifactError
from bloomery.report import quantities
from bloomery.report.run import Stage

_HEADLINES = (
    "validation_loss", "loss", "accuracy", "accuracy_first", "accuracy_last", "tokens", "documents", "rows",
    "examples", "prompts", "vocab_size", "parameters",
)  # fmt: skip
_NAMES = ("source", "name", "task", "id")


@dataclass(frozen=True)
class ModelSize:
    """A model folder as it lies on disk."""

    stage: str
    parameters: int
    bytes: int
    dtypes: str
    shape: str


@dataclass(frozen=True)
class Grid:
    """A table of plain text cells; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def model_size(stage: Stage) -> ModelSize | None:
    """Parameters and bytes counted in the weight files themselves; None where the stage made no model."""
    folder = stage.path / artifact.MODEL
    files = sorted(folder.glob("*.safetensors"))
    if not files or not stage.manifest:
        return None
    parameters, dtypes = 0, dict[str, None]()
    for file in files:
        for count, dtype in _tensors(file):
            parameters += count
            dtypes[dtype] = None
    total = sum(file.stat().st_size for file in files)
    return ModelSize(stage.name, parameters, total, ", ".join(dtypes), _shape(folder))


def _tensors(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                tensor = weights.get_slice(name)
                yield math.prod(tensor.get_shape()), tensor.get_dtype()
    except SafetensorError as error:
        raise ArtifactError(f"{file}: not a readable weight file ({error}); run the stage again") from None


def _shape(folder: Path) -> str:
    """The few sizes that tell models apart, in the names of `config.json`."""
    file = folder / "config.json"
    config = artifact.read_json(file) if file.is_file() else {}
    pattern = config.get("hybrid_override_pattern")
    parts = [
        config.get("model_type"),
        f"{config['num_hidden_layers']} layers" if "num_hidden_layers" in config else None,
        f"hidden {config['hidden_size']}" if "hidden_size" in config else None,
        f"vocabulary {quantities.grouped(config['vocab_size'])}" if "vocab_size" in config else None,
        f"pattern {pattern}" if pattern else None,
    ]
    return " · ".join(str(part) for part in parts if part)


def headlines(stage: Stage, limit: int = 3) -> list[str]:
    """The few scalars of a summary that say most, as `12.3 M tokens` or `validation loss 1.07`."""
    scalars = {name: value for name, value in stage.summary.items() if _is_number(value)}
    ranked = [name for name in _HEADLINES if name in scalars] + [name for name in scalars if name not in _HEADLINES]
    return [_phrase(name, scalars[name]) for name in ranked[:limit]]


def _phrase(name: str, value: float) -> str:
    text = quantities.quantity(name, value)
    return f"{text} {quantities.words(name)}" if isinstance(value, int) else f"{quantities.words(name)} {text}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def summary_rows(stage: Stage) -> list[tuple[str, str]]:
    """Every scalar of the summary with its unit, nested ones by dotted name."""
    return [(quantities.words(name), quantities.quantity(name, value)) for name, value in _scalars(stage.summary)]


def _scalars(value: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        dotted = f"{name}.{key}" if name else str(key)
        if isinstance(item, Mapping):
            if _records(item) is None:
                yield from _scalars(item, dotted)
        elif isinstance(item, list):
            if all(not isinstance(part, Mapping | list) for part in item):
                yield dotted, ", ".join(quantities.quantity("", part) for part in item)
        else:
            yield dotted, item


def summary_tables(stage: Stage) -> list[tuple[str, Grid]]:
    """Parts of the summary that are tables: a mapping of names to numbers by column, or a list of such rows."""
    found = [(str(name), _records(value)) for name, value in stage.summary.items()]
    return [(quantities.words(name), _grid(records)) for name, records in found if records]


def _records(value: Any) -> dict[str, Mapping[str, Any]] | None:
    """Row name → columns; None where `value` is no table."""
    if isinstance(value, Mapping) and value and all(isinstance(item, Mapping) for item in value.values()):
        return {str(name): item for name, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return {str(_row_name(item, index)): item for index, item in enumerate(value)}
    return None


def _row_name(row: Mapping[str, Any], index: int) -> Any:
    return next((row[key] for key in _NAMES if key in row), index + 1)


def _grid(records: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Columns that are zero in every row say nothing and are left out."""
    names = dict.fromkeys(
        name for row in records.values() for name, value in row.items()
        if value != 0 and not isinstance(value, Mapping | list) and name not in _NAMES
    )  # fmt: skip
    rows = ((row, *(quantities.quantity(name, cells.get(name)) for name in names)) for row, cells in records.items())
    return Grid(tuple(quantities.words(name) for name in names), tuple(rows))


def planned_and_read(stage: Stage, sources: Iterable[Stage]) -> list[tuple[str, Grid]]:
    """What a training stage read of each source beside what the blend it read had planned; empty for other stages."""
    read = stage.summary.get("sequences")
    blends = [s.summary["sources"] for s in sources if s.product == "tokens" and "sources" in s.summary]
    if not isinstance(read, Mapping) or not blends:
        return []
    planned = {name: blends[0].get(name, {}).get("training_sequences", 0) for name in read}
    totals = [max(1, sum(counts.values())) for counts in (planned, read)]
    rows = tuple(
        (
            name, quantities.grouped(planned[name]), quantities.percent(planned[name] / totals[0]),
            quantities.grouped(read[name]), quantities.percent(read[name] / totals[1]),
        )
        for name in read
    )  # fmt: skip
    return [("sequences read", Grid(("planned", "share", "read", "share"), rows))]


def data_tables(stage: Stage) -> list[tuple[str, Grid]]:
    """Data by source: the stage's own account, else the rows counted in its files."""
    if stage.family != "data" or not stage.manifest:
        return []
    return summary_tables(stage) or _counted(stage)


def _counted(stage: Stage) -> list[tuple[str, Grid]]:
    sources: dict[str, list[int]] = {}
    for file in sorted((stage.path / artifact.DATA).glob("*.parquet")):
        totals = sources.setdefault(file.stem.rpartition("-")[0] or file.stem, [0, 0])
        totals[0] += pq.read_metadata(file).num_rows
        totals[1] += file.stat().st_size
    rows = tuple((name, quantities.grouped(rows), quantities.size(size)) for name, (rows, size) in sources.items())
    return [("files", Grid(("rows", "on disk"), rows))] if rows else []
