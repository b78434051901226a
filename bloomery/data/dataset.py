"""Dataset folders: `data/{source}-{00000}.parquet`, one row format a kind, loadable with `datasets.load_dataset`."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bloomery import artifact
from bloomery.errors import ArtifactError, ConfigError

Row = dict[str, Any]

ROWS_PER_SHARD = 50_000
_ROWS_PER_READ = 1_000
_CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("train", pa.bool_())]))
_ORIGIN = [("id", pa.string()), ("source", pa.string()), ("metadata", pa.string())]
SCHEMAS = {
    "documents": pa.schema([("text", pa.string()), *_ORIGIN]),
    "messages": pa.schema([("messages", _CHAT), *_ORIGIN]),
    "prompts": pa.schema([("prompt", _CHAT), ("answer", pa.string()), ("verifier", pa.string()), *_ORIGIN]),
    "preferences": pa.schema([("prompt", _CHAT), ("chosen", _CHAT), ("rejected", _CHAT), *_ORIGIN]),
    "traces": pa.schema([
        ("prompt", _CHAT), ("completion", pa.string()), ("answer", pa.string()), ("verifier", pa.string()),
        ("score", pa.float64()), ("status", pa.string()), ("reason", pa.string()), ("tokens", pa.int64()),
        ("finish_reason", pa.string()), ("step", pa.int64()), ("sample", pa.int64()), *_ORIGIN,
    ]),
}  # fmt: skip
"""The columns of each kind. `train` in a message is null unless somebody set it; `read_rows` leaves nulls out."""

CARD = "README.md"


def write_rows(out_dir: Path, source: str, rows: Iterable[Row], kind: str, rows_per_shard: int = ROWS_PER_SHARD) -> int:
    """Write `rows` as the shards of `source`, each atomically, and return how many there were.

    `source` is filled into rows that lack one. Raises `ArtifactError` naming a missing column.
    """
    check_source_name(source)
    schema, folder = _schema(kind), Path(out_dir) / artifact.DATA
    for stale in folder.glob("*.parquet"):
        if stale.name.rpartition("-")[0] == source:
            stale.unlink()
    write_card(Path(out_dir), {"train": f"{artifact.DATA}/*.parquet"})
    iterator, written, shard = iter(rows), 0, 0
    while batch := list(islice(iterator, rows_per_shard)):
        path = folder / f"{source}-{shard:05d}.parquet"
        table = _table(batch, schema, source, written, path)
        with artifact.replacing(path) as temporary:
            pq.write_table(table, temporary, row_group_size=_ROWS_PER_READ * 10)
        written, shard = written + len(batch), shard + 1
    return written


def check_source_name(source: str) -> None:
    """A source's name becomes a file name. Raises `ConfigError`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", source):
        raise ConfigError(f"source {source!r}: expected letters, digits, '_', '.' and '-' only, because it names files")


def _schema(kind: str) -> pa.Schema:
    if kind not in SCHEMAS:
        raise ConfigError(f"kind {kind!r}: expected one of {', '.join(SCHEMAS)}")
    return SCHEMAS[kind]


def _table(rows: list[Row], schema: pa.Schema, source: str, first: int, path: Path) -> pa.Table:
    for number, row in enumerate(rows):
        missing = [name for name in schema.names if name not in row and name not in ("id", "source", "metadata")]
        if missing:
            raise ArtifactError(f"{path}: row {first + number} has no {missing[0]!r}; found {', '.join(sorted(row))}")
    filled = [{"id": str(first + number), "source": source, "metadata": "{}", **row} for number, row in enumerate(rows)]
    try:
        return pa.Table.from_pylist(filled, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
        raise ArtifactError(
            f"{path}: rows {first} to {first + len(rows) - 1} do not fit {schema.names}: {error}"
        ) from None


def write_card(out_dir: Path, splits: Mapping[str, str]) -> None:
    """The dataset card that tells `datasets` which files are which split.

    Without it a source named `test` would be read as the test split, and hide all others.
    """
    files = "".join(f"  - split: {split}\n    path: {pattern}\n" for split, pattern in splits.items())
    header = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
    artifact.write_text(out_dir / CARD, header + "A dataset folder written by bloomery.\n")


def read_rows(path: Path, kind: str, source: str | None = None) -> Iterator[Row]:
    """The rows of a dataset folder, shard after shard in name order, holding only a few thousand at a time.

    source: only the shards of this source. Raises `ArtifactError` for another kind, no Parquet file, no such source,
    or a missing column (naming it and those found).
    """
    path = Path(path)
    schema = _schema(kind)
    artifact.resolve(path, "dataset")
    artifact.require_kind(path, kind)
    files = shards(path, source)
    for file in files:  # all files are checked before the first row is used
        _check_columns(file, schema, kind)
    return _rows(files, schema)


def shards(path: Path, source: str | None = None) -> list[Path]:
    """The Parquet files of a dataset folder (of one source of it), in name order."""
    files = sorted((path / artifact.DATA).glob("*.parquet")) or sorted(path.rglob("*.parquet"))
    if not files:
        raise ArtifactError(
            f"{path}: no Parquet files; expected {artifact.DATA}/*.parquet, as the stage `prepare` writes"
        )
    chosen = [file for file in files if source in (None, _source_of(file))]
    if not chosen:
        raise ArtifactError(f"{path}: no source {source!r}; found {', '.join(sorted(set(map(_source_of, files))))}")
    return chosen


def _source_of(file: Path) -> str:
    return file.stem.rpartition("-")[0] or file.stem


def open_parquet(file: Path) -> pq.ParquetFile:
    """A Parquet file; `ArtifactError` when it is missing or damaged."""
    try:
        return pq.ParquetFile(file)
    except FileNotFoundError:
        raise ArtifactError(f"{file}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{file}: not a readable Parquet file: {error}") from None


def _check_columns(file: Path, schema: pa.Schema, kind: str) -> None:
    with open_parquet(file) as parquet:
        found = parquet.schema_arrow.names
    missing = [name for name in schema.names if name not in found and name not in ("id", "source", "metadata")]
    if missing:
        raise ArtifactError(
            f"{file}: no column {missing[0]!r}; found {', '.join(found)}; {kind} need {', '.join(schema.names[:-3])}"
        )


def _rows(files: list[Path], schema: pa.Schema) -> Iterator[Row]:
    number = 0
    for file in files:
        with open_parquet(file) as parquet:
            for batch in parquet.iter_batches(_ROWS_PER_READ):
                for row in batch.to_pylist():
                    yield _normal(row, schema, number, file)
                    number += 1


def _normal(row: Row, schema: pa.Schema, number: int, file: Path) -> Row:
    """A row with its origin columns filled, and messages without null keys."""
    row = {"id": str(number), "source": _source_of(file), "metadata": "{}", **row}
    for field in schema:
        if field.type == _CHAT and row[field.name] is not None:
            row[field.name] = [{k: v for k, v in message.items() if v is not None} for message in row[field.name]]
    return row


def check_chat(chat: Any) -> str | None:
    """What is wrong with a value that should be a list of messages; `None` when nothing is."""
    if not isinstance(chat, list) or not chat:
        return "no messages"
    for message in chat:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return "a message without text in role and content"
    return None


def text_of(row: Row) -> str:
    """The readable text of a row of any kind: what filters, tokenizer training and people look at."""
    if "text" in row:
        return row["text"]
    turns = [message for name in ("messages", "prompt", "chosen") for message in row.get(name) or []]
    return "\n".join([*(message["content"] for message in turns), *([row["answer"]] if "answer" in row else [])])


def read_texts(path: Path, limit: int | None = None) -> Iterator[str]:
    """The text of each row of a dataset folder, whatever its kind; a foreign folder's kind is told by its columns."""
    return (text_of(row) for row in islice(read_rows(path, kind_of(path)), limit))


def kind_of(path: Path) -> str:
    """The kind of a dataset folder, by its manifest or, in a foreign folder, by its columns."""
    manifest = artifact.read_manifest(Path(path), missing_ok=True)
    if manifest is not None:
        return manifest.kind
    with open_parquet(shards(Path(path))[0]) as parquet:
        found = parquet.schema_arrow.names
    for kind, schema in reversed(SCHEMAS.items()):
        if set(schema.names[:-3]) <= set(found):
            return kind
    raise ArtifactError(
        f"{path}: columns {', '.join(found)} are of no known kind; expected 'text', 'messages' or 'prompt'"
    )
