"""One part of a source, read and filtered on its own: what processes do side by side, and what a killed run keeps.

A part gives a Parquet file of candidates, whose footer also holds what was dropped; a file with its footer is a part
that is done. Whatever needs to know other parts (duplicates, limits, totals) is left to `merge`.
"""

import dataclasses
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bloomery import artifact
from bloomery.data import quality
from bloomery.data.dataset import SCHEMAS
from bloomery.data.decontaminate import Decontaminator, Hit, load
from bloomery.data.dedup import identity, signature
from bloomery.data.document import Document, Drops
from bloomery.data.filters import filter_documents, sample_documents
from bloomery.data.language import language
from bloomery.data.math_filters import filter_math
from bloomery.data.prepare_config import PrepareConfig
from bloomery.data.quality import Classifier
from bloomery.data.read import Invalid
from bloomery.data.sources import Source
from bloomery.data.tokenizer import Tokenizer, load_tokenizer
from bloomery.errors import ArtifactError

WORK = "work"
"""Folder in the stage's output for parts that are done; removed with the last."""

ABOUT = [
    ("_characters", pa.int64()), ("_bytes", pa.int64()), ("_tokens", pa.int64()), ("_exact", pa.binary()),
    ("_near", pa.binary()), ("_language", pa.string()), ("_tier", pa.string()),
]  # fmt: skip
"""Columns of candidates beside those of their kind; null where nobody asked for them."""

_MARK = b"bloomery"
_EXAMPLES = 3
_DOCUMENTS_PER_ENCODE = 512
_CALIBRATION_PARTS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A part of a source with its number, and where its candidates go."""

    source: int
    number: int
    part: Any
    file: Path

    @property
    def done(self) -> bool:
        """Whether this very part has been worked on before."""
        try:
            return bool(read_mark(self.file)["part"] == repr(self.part))
        except (OSError, pa.ArrowInvalid):  # not begun, or lost with the machine's power before it reached the disk
            return False


def read_mark(file: Path) -> dict[str, Any]:
    """`part`, `drops` (candidates before it, reason, example) and `hits` (candidates before it, hit) of a done part."""
    return json.loads(pq.read_schema(file).metadata[_MARK])  # type: ignore[no-any-return]


class Record(Drops):
    """Drops, each with the number of candidates before it: who stops at a candidate knows which drops came before."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0
        self.events: list[tuple[int, str, str]] = []

    def add(self, reason: str, example: str = "") -> None:
        """One more left out; the first few of each reason keep their example."""
        super().add(reason, example)
        self.events.append((self.passed, reason, example if self.counts[reason] <= _EXAMPLES else ""))


class Worker:
    """What the parts of a stage have in common, loaded once in every process."""

    def __init__(self, config: PrepareConfig, out: Path):
        self.config, self.out = config, out
        self.schema = SCHEMAS[config.kind]
        self._benchmarks: Decontaminator | None = load(config.decontaminate) if config.decontaminate else None
        self._tokenizer: Tokenizer | None = load_tokenizer(config.tokenizer) if config.tokenizer else None
        self._classifier: Classifier | None = None
        if config.quality is not None:
            self._classifier, _ = quality.load(config.quality.trained or out / quality.FOLDER)

    def run(self, job: Job) -> None:
        """Write the part's candidates and its mark."""
        source, record = self.config.sources[job.source], Record()
        rows, texts, hits = list[dict[str, Any]](), list[str](), list[tuple[int, dict[str, Any]]]()
        for document in self._clean(source, job.part, record):
            hits += self._new_hits(record.passed)
            record.passed += 1
            rows.append(self._row(document, source))
            texts.append(document.text)
        hits += self._new_hits(record.passed)
        self._count_tokens(rows, texts)
        table = self._table(rows, job.file)
        mark = {"part": repr(job.part), "drops": record.events, "hits": hits}
        table = table.replace_schema_metadata({_MARK: json.dumps(mark)})
        with artifact.replacing(job.file, sync=False) as temporary:
            pq.write_table(table, temporary, compression="zstd", compression_level=1)

    def _clean(self, source: Source, part: Any, record: Record) -> Iterator[Document]:
        documents = filtered(self.config, source, part, record)
        return documents if self._benchmarks is None else self._benchmarks(documents, record)

    def _new_hits(self, position: int) -> list[tuple[int, dict[str, Any]]]:
        if self._benchmarks is None:
            return []
        found: list[Hit] = self._benchmarks.hits[:]
        self._benchmarks.hits.clear()
        return [(position, dataclasses.asdict(hit)) for hit in found]

    def _row(self, document: Document, source: Source) -> dict[str, Any]:
        text, config = document.text, self.config
        spoken = language(text) if config.language else None
        metadata = dict(document.metadata) | ({} if spoken is None else {"language": spoken})
        tier = None
        if self._classifier is not None and source.name in config.tiered:
            score = self._classifier.score(text)
            metadata["quality"], tier = round(score, 4), self._classifier.tier(score)
        if config.instruction is not None:
            document = _instructed(document, config.instruction)
        row = dataclasses.replace(document, source=source.name, metadata=metadata).row(config.kind)
        near = None if config.near_duplicates is None else signature(text, config.near_duplicates).tobytes()
        about = {
            "_characters": len(text), "_bytes": len(text.encode("utf-8", "surrogatepass")), "_language": spoken,
            "_exact": identity(text) if config.deduplicate else None, "_near": near, "_tier": tier,
        }  # fmt: skip
        return {**row, **about}

    def _count_tokens(self, rows: list[dict[str, Any]], texts: list[str]) -> None:
        if self._tokenizer is None:
            return
        for start in range(0, len(texts), _DOCUMENTS_PER_ENCODE):
            encoded = self._tokenizer.encode_batch(texts[start : start + _DOCUMENTS_PER_ENCODE])
            for row, ids in zip(rows[start:], encoded, strict=False):
                row["_tokens"] = len(ids)

    def _table(self, rows: list[dict[str, Any]], file: Path) -> pa.Table:
        schema = pa.schema([*self.schema, *(pa.field(name, kind) for name, kind in ABOUT)])
        try:
            return pa.Table.from_pylist(rows, schema=schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
            raise ArtifactError(f"{file}: the part's rows do not fit {self.schema.names}: {error}") from None


def filtered(config: PrepareConfig, source: Source, part: Any, drops: Drops) -> Iterator[Document]:
    """The documents of a part that no filter drops."""
    documents = source.documents_of(part, config.kind, Invalid(source.on_invalid, drops))
    documents = sample_documents(documents, source.sample)
    documents = filter_documents(documents, source.filters or config.filters, drops)
    return documents if config.math is None else filter_math(documents, config.math, drops)


def calibration_texts(config: PrepareConfig, jobs: list[Job]) -> Iterator[str]:
    """Texts from all over the sources that are sorted by quality: equally many from parts spread over each."""
    assert config.quality is not None
    for name in config.tiered:
        mine = [job for job in jobs if config.sources[job.source].name == name]
        chosen = mine[:: max(1, len(mine) // _CALIBRATION_PARTS)]
        wanted = -(-config.quality.calibration_documents // (len(config.tiered) * max(1, len(chosen))))
        for job in chosen:
            documents = filtered(config, config.sources[job.source], job.part, Drops())
            yield from (document.text for document in islice(documents, wanted))


def _instructed(document: Document, instruction: str) -> Document:
    """With the instruction behind its last message."""
    *before, last = document.columns["prompt"]
    asked = [*before, {**last, "content": f"{last['content']}\n\n{instruction}"}]
    return dataclasses.replace(document, columns={**document.columns, "prompt": asked})
