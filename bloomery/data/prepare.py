"""Stage `prepare`: raw sources into a dataset folder of documents, messages or prompts."""

import dataclasses
import platform
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.config import Config, Field
from bloomery.data.dataset import check_source_name, write_rows
from bloomery.data.decontaminate import DecontaminateConfig, Decontaminator, as_rows, load
from bloomery.data.dedup import ExactDedup
from bloomery.data.document import Document, Drops
from bloomery.data.filters import FilterConfig, filter_documents, sample_documents
from bloomery.data.math_filters import MathFilterConfig, filter_math
from bloomery.data.read import Invalid
from bloomery.data.sources import AnySource, Source
from bloomery.errors import ArtifactError, ConfigError
from bloomery.progress import Bar, say

CONTAMINATION = "contamination.json"
"""File in the folder: which documents hold which benchmark item."""


class PrepareConfig(Config):
    """Read, filter and deduplicate sources."""

    kind: Literal["documents", "messages", "prompts"] = Field(description="what the rows are")
    sources: list[AnySource] = Field(
        description="raw sources; of equal texts in two of them, the first keeps it", min_length=1
    )
    filters: FilterConfig = Field(
        default=FilterConfig(), description="filters of every source that names none of its own"
    )
    math: MathFilterConfig | None = Field(
        default=None, description="filters for math problems with a short, checkable answer (prompts)"
    )
    deduplicate: bool = Field(default=True, description="drop texts seen before, in this source or an earlier one")
    instruction: str | None = Field(
        default=None, description="text behind every question, after an empty line; no filter sees it (prompts)"
    )
    decontaminate: DecontaminateConfig | None = Field(
        default=None, description="drop what shares a run of words with an item of these benchmarks"
    )


def check(config: PrepareConfig) -> dict[str, Any]:
    """What `run` would refuse before reading any data."""
    seen: set[str] = set()
    for source in config.sources:
        check_source_name(source.name)
        if source.name in seen:
            raise ConfigError(
                f"sources: {source.name} is given twice; its files would overwrite each other; rename one"
            )
        seen.add(source.name)
    if config.math is not None and config.kind != "prompts":
        raise ConfigError(f"math: these filters read a question and its answer; kind {config.kind} has none; remove it")
    if config.instruction is not None and config.kind != "prompts":
        raise ConfigError(f"instruction: goes behind a question; kind {config.kind} has none; remove it")
    return {"kind": config.kind, "sources": sorted(seen)}


def run(config: PrepareConfig, out: Path) -> Manifest:
    """Stage `prepare`: Parquet shards by source; the manifest says how many were kept and why others were not."""
    check(config)
    with Output(out, "prepare", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        dedup = ExactDedup() if config.deduplicate else None
        benchmarks = None if config.decontaminate is None else load(config.decontaminate)
        with Bar(f"prepare {config.kind}", len(config.sources)) as bar:
            sources = {}
            for done, source in enumerate(config.sources):
                sources[source.name] = _write(source, config, dedup, benchmarks, output.path, bar, done)
                bar.update(done + 1, source.name)
        documents = sum(source["kept"] for source in sources.values())
        summary = {"documents": documents, "sources": sources, "python": platform.python_version()}
        if benchmarks is not None:
            artifact.write_json(output.path / CONTAMINATION, as_rows(benchmarks.hits))
            summary["renumbered"] = sum(hit.masked for hit in benchmarks.hits)
        return output.finish(config.kind, summary)


def _write(
    source: Source, config: PrepareConfig, dedup: ExactDedup | None, benchmarks: Decontaminator | None, out: Path,
    bar: Bar, done: int,
) -> dict[str, Any]:  # fmt: skip
    """Write one source; returns its counts. Raises `ArtifactError` when nothing of it is left."""
    drops = Drops()
    documents = sample_documents(source.documents(config.kind, Invalid(source.on_invalid, drops)), source.sample)
    documents = filter_documents(documents, source.filters or config.filters, drops)
    if config.math is not None:
        documents = filter_math(documents, config.math, drops)
    if dedup is not None:
        documents = dedup(documents, drops)
    if benchmarks is not None:
        documents = benchmarks(documents, drops)
    if config.instruction is not None:
        documents = (_instructed(document, config.instruction) for document in documents)
    counted = _Counted(islice(documents, source.max_documents), source.name, bar, done)
    kept = write_rows(out, source.name, (document.row(config.kind) for document in counted), config.kind)
    if not kept:
        reason = f"all were dropped: {drops}" if drops.total else "it holds no documents"
        raise ArtifactError(f"source {source.name}: nothing is left of it; {reason}")
    dropped = "".join(f", dropped {count:,} {reason}" for reason, count in drops.counts.most_common())
    say(f"prepare  {source.name}: kept {kept:,}{dropped}")
    return {"kept": kept, "characters": counted.characters, "dropped": dict(drops.counts)}


def _instructed(document: Document, instruction: str) -> Document:
    """With the instruction behind its last message."""
    *before, last = document.columns["prompt"]
    asked = [*before, {**last, "content": f"{last['content']}\n\n{instruction}"}]
    return dataclasses.replace(document, columns={**document.columns, "prompt": asked})


class _Counted:
    """Passes documents on with their source's name, counts characters and moves the bar."""

    def __init__(self, documents: Iterator[Document], source: str, bar: Bar, done: int):
        self._documents, self._source, self._bar, self._done, self.characters = documents, source, bar, done, 0

    def __iter__(self) -> Iterator[Document]:
        for number, document in enumerate(self._documents, 1):
            self.characters += len(document.text)
            if number % 1000 == 0:
                self._bar.update(self._done, f"{self._source}: {number:,} documents")
            yield dataclasses.replace(document, source=self._source)
