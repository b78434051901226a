"""Sketches on disk: one Parquet file for each block of a dataset's rows, its header naming all that makes sketches
comparable. Blocks are made in any order by any rank, a run goes on with those that are missing, folders can be put
together.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bloomery import artifact
from bloomery.config import Config, Field
from bloomery.data.dataset import open_parquet
from bloomery.errors import ArtifactError
from bloomery.synthesize.sketch import SketchConfig

_KEY = b"bloomery"
_MOST_DROPPED = 0.01


class Header(Config):
    """What all sketches that are compared must share."""

    proxy: str = Field(description="digest of the proxy's folder: weights, sizes, tokenizer and chat template")
    vocab_size: int = Field(description="rows of the proxy's embedding (tokens)")
    sketch: SketchConfig = Field(description="the linear map")
    loss: str = Field(default="mean −log p of the completion's tokens, nats", description="whose gradient is sketched")
    rows: str = Field(default="unit root mean square, float16", description="how a sketch is stored")
    dtype: str = Field(description="of the proxy's weights while gradients are taken")
    max_tokens: int = Field(description="longest sample (tokens)")


class Block(Config):
    """Which rows of which dataset a file holds, and what was left out of them."""

    header: Header = Field(description="what is shared")
    data: str = Field(description="digest of the dataset's folder")
    number: int = Field(description="place of this block")
    blocks: int = Field(description="how many the dataset has")
    rows: int = Field(description="rows of the dataset in this block, dropped ones included")
    dropped: dict[str, int] = Field(default={}, description="samples left out, by reason")
    dropped_ids: list[str] = Field(default=[], description="the first of them")
    cut: int = Field(default=0, description="samples whose prompt lost its beginning")

    @property
    def file(self) -> str:
        """Its name."""
        return f"sketches-{self.number:05d}-of-{self.blocks:05d}.parquet"


@dataclass(frozen=True)
class Columns:
    """n samples. z: (n, dim), any scale; norms: (n,) of z before scaling; losses: (n,) nats; tokens: (n,) predicted."""

    ids: list[str]
    sources: list[str]
    tokens: np.ndarray
    losses: np.ndarray
    norms: np.ndarray
    z: np.ndarray


def write_block(folder: Path, block: Block, found: Columns) -> None:
    """One file, whole or not at all. Rows are scaled to a root mean square of 1 before float16, whose smallest numbers
    would swallow a mean-token gradient."""
    dim = block.header.sketch.dim
    scaled = (found.z / found.norms[:, None] * np.sqrt(dim)).astype(np.float16)
    table = pa.table({
        "id": pa.array(found.ids, pa.string()),
        "source": pa.array(found.sources, pa.string()),
        "tokens": pa.array(found.tokens, pa.int32()),
        "loss": pa.array(found.losses, pa.float32()),
        "norm": pa.array(found.norms, pa.float32()),
        "sketch": pa.array([row.tobytes() for row in scaled], pa.binary(2 * dim)),
    })  # fmt: skip
    with artifact.replacing(folder / block.file) as temporary:
        pq.write_table(table.replace_schema_metadata({_KEY: block.model_dump_json()}), temporary, compression="none")


def read_block(file: Path) -> Block:
    """The header of a file. Raises `ArtifactError` where it has none."""
    with open_parquet(file) as parquet:
        raw = (parquet.schema_arrow.metadata or {}).get(_KEY)
    if raw is None:
        raise ArtifactError(f"{file}: holds no sketches; expected a file that `bloomery diversity sketch` wrote")
    return Block.model_validate_json(raw)


class Sketches:
    """Finished sketches of one or several datasets, read a few thousand rows at a time.

    Raises `ArtifactError` for folders that cannot be put together: the field that differs, a block that is missing, a
    sample that is there twice, more than 1 % dropped.
    """

    def __init__(self, *folders: Path):
        self.files: list[Path] = []
        self.blocks: list[Block] = []
        for folder in map(Path, folders):
            self._take(folder)
        self.header = self.blocks[0].header
        self._check_ids()

    def _take(self, folder: Path) -> None:
        files = sorted(folder.glob("sketches-*.parquet"))
        if not files:
            raise ArtifactError(f"{folder}: no sketches; make them with `bloomery diversity sketch`")
        blocks = [read_block(file) for file in files]
        for file, block in zip(files, blocks, strict=True):
            check_same((self.blocks or blocks)[0].header, block.header, file)
        missing = sorted(set(range(blocks[0].blocks)) - {block.number for block in blocks})
        if missing:
            raise ArtifactError(
                f"{folder}: block {missing[0]} of {blocks[0].blocks} is missing; run the same `diversity sketch` "
                "again, it makes only what is missing"
            )
        _check_drops(folder, blocks)
        self.files += files
        self.blocks += blocks

    def _check_ids(self) -> None:
        ids = self.column("id")
        values, counts = np.unique(np.array(ids), return_counts=True)
        if len(values) < len(ids):
            twice = values[counts > 1]
            raise ArtifactError(
                f"{self.files[0].parent}: {len(twice)} ids are there more than once, first {str(twice[0])!r}; "
                "every sample needs an id of its own, and no dataset may be given twice"
            )

    def __len__(self) -> int:
        return len(self.column("id"))

    def column(self, name: str) -> list[Any]:
        """All values of `id`, `source`, `tokens`, `loss` or `norm`, in order."""
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, list[Any]]:
        names = ["id", "source", "tokens", "loss", "norm"]
        tables = [pq.read_table(file, columns=names) for file in self.files]
        return {name: [value for table in tables for value in table[name].to_pylist()] for name in names}

    def batches(self, rows: int = 65_536) -> Iterator[np.ndarray]:
        """(n, dim) float16, all of them in order, about `rows` at a time."""
        held: list[np.ndarray] = []
        for file in self.files:
            with open_parquet(file) as parquet:
                for batch in parquet.iter_batches(rows, columns=["sketch"]):
                    held.append(self._decoded(batch["sketch"]))
                    if sum(map(len, held)) >= rows:
                        yield np.concatenate(held)
                        held = []
        if held:
            yield np.concatenate(held)

    def _decoded(self, column: pa.Array) -> np.ndarray:
        dim = self.header.sketch.dim
        data = np.frombuffer(column.buffers()[1], dtype=np.float16)
        return data[column.offset * dim : (column.offset + len(column)) * dim].reshape(-1, dim)

    def rows(self) -> np.ndarray:
        """(samples, dim) float16, all in memory."""
        return np.concatenate(list(self.batches()))

    @property
    def dropped(self) -> dict[str, int]:
        """Samples left out, by reason, over all blocks."""
        reasons = sorted({reason for block in self.blocks for reason in block.dropped})
        return {reason: sum(block.dropped.get(reason, 0) for block in self.blocks) for reason in reasons}


def check_same(expected: Header, found: Header, where: Path) -> None:
    """Raises `ArtifactError` naming the first field that differs."""
    mine, theirs = (json.loads(header.model_dump_json()) for header in (expected, found))
    for name, value in mine.items():
        if theirs[name] != value:
            raise ArtifactError(
                f"{where}: {name} {theirs[name]!r}, the other sketches have {value!r}; only sketches of the same "
                "proxy, map and settings can be compared"
            )


def _check_drops(folder: Path, blocks: Sequence[Block]) -> None:
    rows, dropped = sum(block.rows for block in blocks), sum(sum(block.dropped.values()) for block in blocks)
    if dropped > _MOST_DROPPED * rows:
        first = [name for block in blocks for name in block.dropped_ids][:3]
        raise ArtifactError(
            f"{folder}: {dropped} of {rows} samples have no gradient to compare (first: {', '.join(first)}); at most "
            "1 % may be left out. Clean the data, or raise max_tokens"
        )
