"""Documents from other people's formats: text files, JSONL, Parquet, Hugging Face datasets, the standard library.

What cannot be read is never skipped silently: it is counted in `drops`, or, with `on_invalid="error"`, an error that
names the file and the byte.
"""

import ast
import hashlib
import inspect
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from bloomery.data.dataset import Row, check_chat, open_parquet, text_of
from bloomery.data.document import Document, Drops
from bloomery.data.pieces import MAX_LINE_BYTES, Part, Piece, files_in, lines_of, open_stream, split_stream
from bloomery.errors import ArtifactError, ConfigError

OnInvalid = Literal["drop", "error"]
Located = tuple[str, Row]
"""Where a row stands, for messages, and the row."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
_ROWS_PER_READ = 1_000


@dataclass
class Invalid:
    """What to do with input that cannot be read: count it in `drops`, or stop."""

    on_invalid: OnInvalid = "drop"
    drops: Drops = field(default_factory=Drops)

    def __call__(self, where: str, reason: str, detail: str) -> None:
        """Something at `where` is unusable for `reason`. Raises `ArtifactError` unless such things are dropped."""
        if self.on_invalid == "error":
            raise ArtifactError(
                f"{where}: {detail}; repair it, or set on_invalid: drop to leave such input out, counted"
            )
        self.drops.add(reason, where)

    def text(self, data: bytes, where: str, start: int = 0) -> str | None:
        """`data` as text, or `None` where it is not UTF-8. start: place of `data` in its file, in bytes."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            place = start + error.start
            self(where, "invalid UTF-8", f"byte {place} ({data[error.start]:#04x}) is not UTF-8")
            return None

    def line(self, line: bytes | None, where: str, start: int) -> str | None:
        """`text` of a line or another part of a file, where it was short enough to be read."""
        if line is None:
            limit = f"longer than {MAX_LINE_BYTES // 2**20} MiB"
            self(where, limit, f"found a line {limit}")
            return None
        return self.text(line, where, start)


@contextmanager
def _readable(file: Path, invalid: Invalid) -> Iterator[None]:
    """What a damaged file gives before its damage is used; the rest is counted, or an error."""
    try:
        yield
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from None
        invalid(str(file), "damaged file", f"damaged: {error}")


def read_text(path: Path, pattern: str, separator: str | None, invalid: Invalid) -> Iterator[Document]:
    """Text files: each is a document, or each part between `separator`s is."""
    return read_text_files(tuple(map(Piece, files_in(path, pattern))), separator, invalid)


def read_text_files(part: Part, separator: str | None, invalid: Invalid) -> Iterator[Document]:
    """`read_text` of some of the files."""
    for piece in part:
        file = piece.file
        with _readable(file, invalid), open_stream(file) as stream:
            if separator is None:
                text = invalid.text(stream.read(), str(file))
                if text is not None:
                    yield Document(text, metadata={"file": file.name})
                continue
            for number, (place, found) in enumerate(split_stream(stream, separator.encode())):
                text = invalid.line(found, f"{file}, part {number}", place)
                if text is not None:
                    yield Document(text, metadata={"file": file.name, "part": number})


def read_jsonl(path: Path, pattern: str, invalid: Invalid) -> Iterator[Located]:
    """The objects of JSONL files, one a line; empty lines are passed over."""
    return read_jsonl_lines(tuple(map(Piece, files_in(path, pattern))), invalid)


def read_jsonl_lines(part: Part, invalid: Invalid) -> Iterator[Located]:
    """`read_jsonl` of some of the lines."""
    for piece in part:
        with _readable(piece.file, invalid):
            for where, start, line in lines_of(piece):
                row = _json_object(line, where, start, invalid)
                if row is not None:
                    yield where, row


def _json_object(line: bytes | None, where: str, start: int, invalid: Invalid) -> Row | None:
    text = invalid.line(line, where, start)
    if text is None:
        return None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        invalid(where, "invalid JSON", f"not JSON: {error.msg} at column {error.colno}")
        return None
    except RecursionError:
        invalid(where, "invalid JSON", "JSON nested too deeply")
        return None
    if not isinstance(row, dict):
        invalid(where, "not a JSON object", f"found a JSON {type(row).__name__}, expected an object")
        return None
    return row


def read_parquet(path: Path, pattern: str, invalid: Invalid) -> Iterator[Located]:
    """The rows of Parquet files."""
    return read_parquet_groups(tuple(map(Piece, files_in(path, pattern))), invalid)


def parquet_pieces(files: Iterable[Path], part_bytes: int) -> list[Piece]:
    """Row groups that together are about `part_bytes` long."""
    pieces = []
    for file in files:
        with open_parquet(file) as parquet:
            sizes = [parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups)]
        start = 0
        for stop in range(1, len(sizes) + 1):
            if stop == len(sizes) or sum(sizes[start : stop + 1]) > part_bytes:
                pieces.append(Piece(file, start, stop, sum(sizes[start:stop])))
                start = stop
    return pieces


def read_parquet_groups(part: Part, invalid: Invalid) -> Iterator[Located]:
    """`read_parquet` of some of the row groups."""
    for piece in part:
        file = piece.file
        with open_parquet(file) as parquet:
            groups = range(piece.start, parquet.num_row_groups if piece.stop is None else piece.stop)
            number = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.start))
            for batch in parquet.iter_batches(_ROWS_PER_READ, list(groups)) if groups else ():
                yield from _parquet_rows(batch, f"{file}, row {{}}", number, invalid)
                number += len(batch)


def _parquet_rows(batch: pa.RecordBatch, where: str, first: int, invalid: Invalid) -> Iterator[Located]:
    try:
        rows = [[row] for row in batch.to_pylist()]
    except UnicodeDecodeError:  # Arrow does not check strings on reading: find the rows at fault
        rows = [list(_one(batch, number, where.format(first + number), invalid)) for number in range(len(batch))]
    for number, found in enumerate(rows):
        yield from ((where.format(first + number), row) for row in found)


def _one(batch: pa.RecordBatch, number: int, where: str, invalid: Invalid) -> Iterator[Row]:
    try:
        yield batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        invalid(where, "invalid UTF-8", f"byte {error.start} of a string is not UTF-8")


def read_hf(
    path: str, name: str | None, split: str, revision: str | None, shard: tuple[int, int] | None = None
) -> Iterator[Located]:
    """The rows of a split of a Hugging Face dataset, streamed: a local folder or a name on the hub.

    shard: (number, of how many) of the shards that the dataset itself has; all where not given.
    Raises `ArtifactError` where it cannot be loaded.
    """
    dataset, where = open_hf(path, name, split, revision), path
    if shard is not None:
        dataset, where = dataset.shard(shard[1], shard[0]), f"{path}, shard {shard[0]}"
    for number, row in enumerate(dataset):
        yield f"{where}, row {number}", dict(row)


def open_hf(path: str, name: str | None, split: str, revision: str | None) -> Any:
    """The streaming dataset of a split; `ArtifactError` where it cannot be loaded."""
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split, revision=revision, streaming=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: `datasets` cannot load it: {error}") from None


def read_stdlib(
    part: Literal["sources", "docstrings"], invalid: Invalid, files: Sequence[Path] | None = None
) -> Iterator[Document]:
    """Python's own standard library: real code, or real prose about it, on any machine without network.

    Docstrings are one document each. files: those of `stdlib_files` that are read; all where not given.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for name in stdlib_files() if files is None else files:
        text = invalid.text((root / name).read_bytes(), str(root / name))
        if text is None:
            continue
        module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
        if part == "sources":
            yield Document(text, metadata={"module": module})
        else:
            yield from (
                Document(f"{where}\n\n{doc}", metadata={"module": module}) for where, doc in _docs(text, module)
            )


def stdlib_files() -> list[Path]:
    """The library's Python files, relative to its folder, without its tests and installed packages.

    They come in the order of a hash of their names, so that the first n are a fair sample.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(_modules(root), key=lambda name: hashlib.blake2b(name.as_posix().encode()).digest())


def _modules(root: Path) -> Iterator[Path]:
    """Python files below `root`, relative to it, without those that are not the library's own."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_LIBRARY]
        yield from (Path(folder, name).relative_to(root) for name in files if name.endswith(".py"))


def _docs(source: str, module: str) -> Iterator[tuple[str, str]]:
    """Dotted name and docstring of a module, its classes and its functions, in source order."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return  # the library ships a few templates that are not Python
    yield from _docs_below(tree, module)


def _docs_below(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node, clean=False)
        if doc:
            yield name, inspect.cleandoc(doc)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docs_below(child, f"{name}.{child.name}")


def to_documents(
    rows: Iterable[Located], kind: str, columns: Mapping[str, str], constants: Mapping[str, str], invalid: Invalid
) -> Iterator[Document]:
    """Foreign rows as documents of a kind.

    columns: our column → theirs, where the names differ; constants: our column → a value for all rows. Chats may be
    given as `messages`, or as `prompt` and `completion`; a chat that is plain text is one message.
    Raises `ArtifactError` naming a missing column and those found.
    """
    for where, row in rows:
        try:
            wanted = _columns(row, kind, columns, constants, where)
        except _Unusable as error:
            invalid(where, str(error), f"{error}")
            continue
        origin = {name: row.get(columns.get(name, name)) for name in ("id", "metadata")}
        own = {} if kind == "documents" else wanted
        yield Document(text_of(wanted), str(origin["id"] or ""), metadata=_metadata(origin["metadata"]), columns=own)


class _Unusable(Exception):
    """A row whose value is empty or of the wrong type; the message is the reason."""


def _columns(
    row: Row, kind: str, columns: Mapping[str, str], constants: Mapping[str, str], where: str
) -> dict[str, Any]:
    def get(name: str) -> Any:
        theirs = columns.get(name, name)
        if theirs not in row:
            raise ArtifactError(
                f"{where}: no column {theirs!r}; found {', '.join(row)}; name it with columns: {{{name}: …}}"
            )
        return row[theirs]

    if kind == "documents":
        return {"text": _text(get("text"), "text")}
    if kind == "messages":
        if columns.get("completion", "completion") in row:
            return {"messages": _chat(get("prompt"), "user") + _chat(get("completion"), "assistant")}
        return {"messages": _chat(get("messages"), "user")}
    if kind == "prompts":
        verifier = constants["verifier"] if "verifier" in constants else _text(get("verifier"), "verifier")
        answer = get("answer")
        answer = str(answer) if isinstance(answer, int | float) else _text(answer, "answer")
        return {"prompt": _chat(get("prompt"), "user"), "answer": answer, "verifier": verifier}
    raise ConfigError(f"kind {kind!r}: expected documents, messages or prompts")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"no text in {name}")
    return value


def _chat(value: Any, role: str) -> list[dict[str, Any]]:
    chat = [{"role": role, "content": value}] if isinstance(value, str) else value
    problem = check_chat(chat)
    if problem:
        raise _Unusable(problem)
    return chat


def _metadata(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return {"metadata": value}
    return value if isinstance(value, dict) else {}
