"""Candidates of all parts, in order, into the dataset folder: duplicates out, limits kept, tiers apart, all counted."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bloomery import artifact
from bloomery.data.dataset import ROWS_PER_SHARD, SCHEMAS
from bloomery.data.dedup import ExactDedup, NearDedup
from bloomery.data.document import Drops
from bloomery.data.part import Job, read_mark
from bloomery.data.prepare_config import PrepareConfig
from bloomery.errors import ArtifactError

_ROWS_PER_GROUP = 10_000


@dataclass
class Held:
    """What a source, or a quality tier of one, holds in the end. tokens: None where no tokenizer counted."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int | None = None
    languages: Counter[str] = field(default_factory=Counter)

    def add(self, table: pa.Table) -> None:
        """Count these candidates."""
        self.documents += table.num_rows
        self.characters += pc.sum(table["_characters"]).as_py() or 0
        self.bytes += pc.sum(table["_bytes"]).as_py() or 0
        if (tokens := pc.sum(table["_tokens"]).as_py()) is not None:
            self.tokens = (self.tokens or 0) + tokens
        for row in pc.value_counts(table["_language"].drop_null()).to_pylist():
            self.languages[row["values"]] += row["counts"]

    def to_json(self) -> dict[str, Any]:
        """What the manifest says of it."""
        counted = {} if self.tokens is None else {"tokens": self.tokens}
        spoken = {"languages": dict(self.languages.most_common())} if self.languages else {}
        return {
            "documents": self.documents, "bytes": self.bytes, "characters": self.characters, **counted, **spoken,
        }  # fmt: skip


class Merge:
    """Writes one source after another; what was seen in one is a duplicate in the next."""

    def __init__(self, config: PrepareConfig, folder: Path):
        self.config, self.folder = config, folder
        self._exact = ExactDedup() if config.deduplicate else None
        self._near = None if config.near_duplicates is None else NearDedup(config.near_duplicates)
        self.inventory: dict[str, dict[str, Any]] = {}
        self.hits: list[dict[str, Any]] = []

    def source(self, number: int, tiers: Iterable[str], jobs: Iterable[Job]) -> dict[str, Any]:
        """Write the source from its parts as they are done; its counts. Stops early where `max_documents` is reached.

        tiers: quality tiers, each a source of its own; none where it stays one. Raises `ArtifactError` when nothing is
        left of it.
        """
        source, drops, total, ids = self.config.sources[number], Drops(), Held(), Ids()
        names: dict[str | None, str] = {tier: f"{source.name}-{tier}" for tier in tiers}
        names = names or {None: source.name}
        held = {name: Held() for name in names.values()}
        with ExitStack() as files:
            writers = {
                name: files.enter_context(ShardWriter(self.folder, name, SCHEMAS[self.config.kind]))
                for name in names.values()
            }
            for job in jobs:
                room = None if source.max_documents is None else source.max_documents - total.documents
                kept = self._keep(job, drops, room)
                kept = ids.unique(kept) if self.config.kind == "documents" else kept
                total.add(kept)
                for tier, name in names.items():
                    mine = kept if tier is None else kept.filter(pc.equal(kept["_tier"], tier))
                    held[name].add(mine)
                    writers[name].write(mine)
                if total.documents == source.max_documents:
                    break
        if not total.documents:
            reason = f"all were dropped: {drops}" if drops.total else "it holds no documents"
            raise ArtifactError(f"source {source.name}: nothing is left of it; {reason}")
        origin = {} if source.license is None else {"license": source.license}
        self.inventory |= {name: {**each.to_json(), **origin} for name, each in held.items()}
        counts = total.to_json()
        repeated = {"repeated_ids": ids.repeated} if ids.repeated else {}
        return {"kept": counts.pop("documents"), **counts, **repeated, "dropped": dict(drops.counts.most_common())}

    def _keep(self, job: Job, drops: Drops, room: int | None) -> pa.Table:
        """The candidates of a part that are no duplicates, at most `room`; what came before the last of them counts."""
        table, mark = pq.read_table(job.file), read_mark(job.file)
        kept: list[int] = []
        last = table.num_rows
        for place, reason in self._judged(table):
            if reason is not None:
                drops.add(reason, str(table["id"][place]))
                continue
            kept.append(place)
            if len(kept) == room:
                last = place
                break
        for before, reason, example in mark["drops"]:
            if before <= last:
                drops.add(reason, example)
        chosen = set(kept)
        self.hits += [hit for place, hit in mark["hits"] if (place in chosen if hit["masked"] else place <= last)]
        return table.take(pa.array(kept, pa.int64()))

    def _judged(self, table: pa.Table) -> Iterator[tuple[int, str | None]]:
        """Each candidate's place, with the reason for which it is dropped."""
        exact, near = table["_exact"].to_pylist(), table["_near"].to_pylist()
        for place in range(table.num_rows):
            if self._exact is not None and not self._exact.is_new(exact[place]):
                yield place, "duplicate"
            elif self._near is not None and not self._near.is_new(np.frombuffer(near[place], dtype=np.uint32)):
                yield place, "near duplicate"
            else:
                yield place, None


class Ids:
    """Ids of one source's texts. A repeated one gets a number, `a`, `a-2`, `a-3`, and is counted; its text is kept."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self.repeated = 0

    def unique(self, table: pa.Table) -> pa.Table:
        """The table with ids that no other row of the source has."""
        ids = [self._unique(each) for each in table["id"].to_pylist()]
        return table.set_column(table.column_names.index("id"), "id", pa.array(ids, pa.string()))

    def _unique(self, found: str) -> str:
        name, number = found, 1
        while name in self._seen:
            number += 1
            name = f"{found}-{number}"
        self.repeated += number > 1
        self._seen.add(name)
        return name


class ShardWriter:
    """Writes the rows of one source as `{source}-{00000}.parquet` …; each file appears when it is complete."""

    def __init__(self, folder: Path, source: str, schema: pa.Schema):
        self.folder, self.source, self.schema = folder, source, schema
        self._shard = self._rows = 0
        self._files = ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def write(self, table: pa.Table) -> None:
        """Append rows; columns that the kind does not have are left out, and the source's name is filled in."""
        named = pa.array([self.source] * table.num_rows, pa.string())
        table = table.select(self.schema.names)
        table = table.set_column(table.column_names.index("source"), "source", named).cast(self.schema)
        while table.num_rows:
            part = table.slice(0, ROWS_PER_SHARD - self._rows)
            self._open().write_table(part, row_group_size=_ROWS_PER_GROUP)
            self._rows += part.num_rows
            table = table.slice(part.num_rows)
            if self._rows == ROWS_PER_SHARD:
                self._close()

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            path = self.folder / artifact.DATA / f"{self.source}-{self._shard:05d}.parquet"
            temporary = self._files.enter_context(artifact.replacing(path))
            self._writer = self._files.enter_context(pq.ParquetWriter(temporary, self.schema))
        return self._writer

    def _close(self) -> None:
        self._files.close()
        self._writer, self._rows, self._shard = None, 0, self._shard + 1
