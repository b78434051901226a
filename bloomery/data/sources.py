"""The settings of each kind of raw source, and the documents it gives."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import field_validator

from bloomery.config import Config, Field, RawPath
from bloomery.data import read
from bloomery.data.dataset import text_of
from bloomery.data.document import Document
from bloomery.data.filters import FilterConfig
from bloomery.data.pieces import Part, files_in, in_parts, line_pieces, whole_files
from bloomery.data.procedural import Problem, generate
from bloomery.data.qa_source import QAConfig, Questions
from bloomery.errors import ConfigError

_MODULES_PER_PART = 25


class Source(Config, ABC):
    """What all sources share."""

    name: str = Field(description="names the source's files and its rows: letters, digits, '_', '.', '-'")
    max_documents: int | None = Field(
        default=None, description="keep at most this many documents, the first ones", gt=0
    )
    sample: float = Field(
        default=1.0, description="keep this share of the documents, chosen by a hash of the text", gt=0, le=1
    )
    filters: FilterConfig | None = Field(
        default=None, description="filters of this source; the stage's where not given"
    )
    on_invalid: read.OnInvalid = Field(
        default="drop", description="input that cannot be read is dropped with a count, or an error"
    )

    license: str | None = Field(default=None, description="licence of the texts, for the inventory")

    @abstractmethod
    def documents(self, kind: str, invalid: read.Invalid) -> Iterator[Document]:
        """The source's documents, as rows of `kind`. Raises `ConfigError` where it cannot give that kind."""

    def parts(self, part_bytes: int) -> Sequence[Any]:
        """What can be read on its own, in order, each about `part_bytes` of input; by default there is only the whole.

        How a source is cut never changes its documents.
        """
        return [None]

    def documents_of(self, part: Any, kind: str, invalid: read.Invalid) -> Iterator[Document]:
        """The documents of one of `parts`."""
        return self.documents(kind, invalid)

    def check_kind(self, kind: str) -> None:
        """Raises `ConfigError` where the source can never give rows of `kind`."""

    def _only_text(self, kind: str) -> None:
        if kind != "documents":
            raise ConfigError(
                f"source {self.name}: plain text gives documents, not {kind}; choose another type of source"
            )


class TextSource(Source):
    """Text files."""

    type: Literal["text"] = "text"
    path: RawPath = Field(description="file or folder")
    pattern: str = Field(default="**/*.txt", description="files of a folder that are read")
    separator: str | None = Field(
        default=None, description="text between two documents of a file; each file is one where not given"
    )

    def check_kind(self, kind: str) -> None:
        """Text is a document and nothing else."""
        self._only_text(kind)

    def documents(self, kind: str, invalid: read.Invalid) -> Iterator[Document]:
        """Each file, or each part of it."""
        self._only_text(kind)
        return read.read_text(self.path, self.pattern, self.separator, invalid)

    def parts(self, part_bytes: int) -> Sequence[Part]:
        """Whole files, small ones together."""
        return in_parts(whole_files(files_in(self.path, self.pattern)), part_bytes)

    def documents_of(self, part: Part, kind: str, invalid: read.Invalid) -> Iterator[Document]:
        """Of some files."""
        self._only_text(kind)
        return read.read_text_files(part, self.separator, invalid)


class RowSource(Source):
    """What sources with columns share."""

    columns: dict[str, str] = Field(
        default={}, description="our column → theirs, where the names differ, such as text: content"
    )
    verifier: str | None = Field(
        default=None, description="verifier of all rows, where they have no such column (prompts)"
    )
    qa: QAConfig | None = Field(
        default=None, description="the rows are questions, of multiple choice or open, and this says how they are read"
    )

    @abstractmethod
    def rows(self, invalid: read.Invalid) -> Iterator[read.Located]:
        """The raw rows, each with its place."""

    def documents(self, kind: str, invalid: read.Invalid) -> Iterator[Document]:
        """The rows, their columns renamed and checked; or the questions that they are."""
        if self.qa is not None:
            return Questions(self.rows(invalid), self.qa, self.columns, self.name, invalid).documents(kind)
        return self._to_documents(self.rows(invalid), kind, invalid)

    def parts(self, part_bytes: int) -> Sequence[Any]:
        """Some rows at a time; questions are read as a whole, because their filters look at all of them."""
        return [None] if self.qa is not None else self.row_parts(part_bytes)

    def row_parts(self, part_bytes: int) -> Sequence[Any]:
        """What `rows_of` can read on its own."""
        return [None]

    def rows_of(self, part: Any, invalid: read.Invalid) -> Iterator[read.Located]:
        """The raw rows of one of `row_parts`."""
        return self.rows(invalid)

    def documents_of(self, part: Any, kind: str, invalid: read.Invalid) -> Iterator[Document]:
        """Of some rows."""
        if part is None:
            return self.documents(kind, invalid)
        return self._to_documents(self.rows_of(part, invalid), kind, invalid)

    def _to_documents(self, rows: Iterator[read.Located], kind: str, invalid: read.Invalid) -> Iterator[Document]:
        constants = {} if self.verifier is None else {"verifier": self.verifier}
        return read.to_documents(rows, kind, self.columns, constants, invalid)


class JsonlSource(RowSource):
    """JSONL files."""

    type: Literal["jsonl"] = "jsonl"
    path: RawPath = Field(description="file or folder")
    pattern: str = Field(default="**/*.jsonl", description="files of a folder that are read")

    def rows(self, invalid: read.Invalid) -> Iterator[read.Located]:
        """One row a line."""
        return read.read_jsonl(self.path, self.pattern, invalid)

    def row_parts(self, part_bytes: int) -> Sequence[Part]:
        """Stretches of lines."""
        return in_parts(line_pieces(files_in(self.path, self.pattern), part_bytes), part_bytes)

    def rows_of(self, part: Part, invalid: read.Invalid) -> Iterator[read.Located]:
        """Of some lines."""
        return read.read_jsonl_lines(part, invalid)


class ParquetSource(RowSource):
    """Parquet files."""

    type: Literal["parquet"] = "parquet"
    path: RawPath = Field(description="file or folder")
    pattern: str = Field(default="**/*.parquet", description="files of a folder that are read")

    def rows(self, invalid: read.Invalid) -> Iterator[read.Located]:
        """The rows of all files."""
        return read.read_parquet(self.path, self.pattern, invalid)

    def row_parts(self, part_bytes: int) -> Sequence[Part]:
        """Row groups."""
        return in_parts(read.parquet_pieces(files_in(self.path, self.pattern), part_bytes), part_bytes)

    def rows_of(self, part: Part, invalid: read.Invalid) -> Iterator[read.Located]:
        """Of some row groups."""
        return read.read_parquet_groups(part, invalid)


class HfSource(RowSource):
    """A dataset that the library `datasets` loads."""

    type: Literal["hf"] = "hf"
    path: str = Field(description="local folder or name on the Hugging Face hub")
    config_name: str | None = Field(default=None, description="configuration of the dataset")
    split: str = Field(default="train", description="split of the dataset")
    revision: str | None = Field(
        default=None, description="commit or tag on the hub; give it, or the data may change under you"
    )

    def rows(self, invalid: read.Invalid) -> Iterator[read.Located]:
        """The rows of the split, streamed."""
        return read.read_hf(self.path, self.config_name, self.split, self.revision)

    def row_parts(self, part_bytes: int) -> Sequence[tuple[int, int]]:
        """The dataset's own shards, (number, of how many)."""
        shards = read.open_hf(self.path, self.config_name, self.split, self.revision).num_shards
        return [(number, shards) for number in range(shards)]

    def rows_of(self, part: tuple[int, int], invalid: read.Invalid) -> Iterator[read.Located]:
        """Of one shard."""
        return read.read_hf(self.path, self.config_name, self.split, self.revision, part)


class StdlibSource(Source):
    """The Python standard library."""

    type: Literal["stdlib"] = "stdlib"
    part: Literal["sources", "docstrings"] = Field(
        default="sources", description="whole modules, or one document a docstring"
    )

    def check_kind(self, kind: str) -> None:
        """Text is a document and nothing else."""
        self._only_text(kind)

    def documents(self, kind: str, invalid: read.Invalid) -> Iterator[Document]:
        """Modules or docstrings."""
        self._only_text(kind)
        return read.read_stdlib(self.part, invalid)

    def parts(self, part_bytes: int) -> Sequence[Sequence[Path]]:
        """Some modules at a time."""
        files = read.stdlib_files()
        return [files[start : start + _MODULES_PER_PART] for start in range(0, len(files), _MODULES_PER_PART)]

    def documents_of(self, part: Sequence[Path], kind: str, invalid: read.Invalid) -> Iterator[Document]:
        """Of some modules."""
        self._only_text(kind)
        return read.read_stdlib(self.part, invalid, part)


class ProceduralSource(Source):
    """Generated problems with worked solutions."""

    type: Literal["procedural"] = "procedural"
    task: str = Field(description="a task of bloomery.data.procedural, such as chain; gym for reasoning-gym")
    count: int = Field(description="distinct problems", gt=0)
    split: Literal["train", "test"] = Field(
        default="train", description="the two never share a problem, whatever the seeds"
    )
    seed: int = Field(default=0, description="seed of the problems")
    style: dict[str, float] | None = Field(
        default=None, description="shares of the solution styles direct and stepwise"
    )
    options: dict[str, Any] = Field(default={}, description="settings of the task")

    @field_validator("options")
    @classmethod
    def _of_the_task(cls, options: dict[str, Any]) -> dict[str, Any]:
        misplaced = [name for name in options if name in cls.model_fields]
        if misplaced:
            raise ValueError(f"{misplaced[0]} is a field of the source, beside options; move it there")
        return options

    def documents(self, kind: str, invalid: read.Invalid) -> Iterator[Document]:
        """Each problem as text, chat or prompt."""
        problems = generate(
            self.task, seed=self.seed, count=self.count, split=self.split, style=self.style, **self.options
        )
        return (_problem_document(problem, kind) for problem in problems)


def _problem_document(problem: Problem, kind: str) -> Document:
    question = {"role": "user", "content": problem.question}
    forms: dict[str, dict[str, Any]] = {
        "documents": {"text": f"{problem.question}\n{problem.solution}"},
        "messages": {"messages": [question, {"role": "assistant", "content": problem.solution}]},
        "prompts": {"prompt": [question], "answer": problem.answer, "verifier": problem.verifier},
    }
    columns = forms[kind]
    metadata = {**problem.metadata, "domain": problem.domain}
    own = {} if kind == "documents" else columns
    return Document(text_of(columns), problem.id, metadata=metadata, columns=own)


AnySource = Annotated[
    TextSource | JsonlSource | ParquetSource | HfSource | StdlibSource | ProceduralSource, Field(discriminator="type")
]
