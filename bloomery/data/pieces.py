"""Files cut into pieces that are read on their own: the unit of parallel work, and of resuming.

A part of a source is a tuple of pieces. How files are cut never changes which documents there are, nor their order.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa

from bloomery.errors import ArtifactError

COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
PART_BYTES = 16 * 2**20
MAX_LINE_BYTES = 64 * 2**20
"""A longer line is no document: it is passed over without being held in memory."""

_FILES_PER_PART = 1_000
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a file: of a JSONL file the lines that start in the bytes [start, stop), of a Parquet file the row groups
    [start, stop); of every other file, all of it (`stop` is None).

    size: bytes of input, where that is known.
    """

    file: Path
    start: int = 0
    stop: int | None = None
    size: int = 0


Part = tuple[Piece, ...]


def files_in(path: Path, pattern: str) -> list[Path]:
    """`path` itself, or the files below it that match `pattern`, compressed or not, in name order.

    Raises `ArtifactError` where there is none.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder")
    patterns = [pattern, *(pattern + suffix for suffix in COMPRESSED)]
    found = sorted({file for each in patterns for file in path.glob(each) if file.is_file()})
    if not found:
        raise ArtifactError(f"{path}: no file matches {pattern!r}; give another pattern")
    return found


def whole_files(files: Iterable[Path]) -> list[Piece]:
    """A piece for each file."""
    return [Piece(file, size=file.stat().st_size) for file in files]


def line_pieces(files: Iterable[Path], part_bytes: int) -> list[Piece]:
    """Pieces of at most `part_bytes` of files of lines; a compressed file cannot be cut."""
    pieces = []
    for file in files:
        size = file.stat().st_size
        if file.suffix in COMPRESSED or size <= part_bytes:
            pieces.append(Piece(file, size=size))
        else:
            stops = [(start, min(start + part_bytes, size)) for start in range(0, size, part_bytes)]
            pieces += [Piece(file, start, stop, stop - start) for start, stop in stops]
    return pieces


def in_parts(pieces: Iterable[Piece], part_bytes: int) -> list[Part]:
    """Pieces in their order, small ones together in one part."""
    parts: list[Part] = []
    current: list[Piece] = []
    held = 0
    for piece in pieces:
        if current and (held + piece.size > part_bytes or len(current) == _FILES_PER_PART):
            parts.append(tuple(current))
            current, held = [], 0
        current.append(piece)
        held += piece.size
    return [*parts, tuple(current)] if current else parts


def open_stream(file: Path) -> IO[bytes]:
    """A file's bytes, decompressed where its name ends in `.gz`, `.zst`, `.bz2` or `.lz4`."""
    if file.suffix not in COMPRESSED:
        return file.open("rb")
    return io.BufferedReader(pa.input_stream(str(file), compression="detect"), _CHUNK)  # type: ignore[arg-type]


Line = tuple[str, int, bytes | None]
"""Where a line stands, the place of its first byte in the file, and the line; `None` for one that is too long."""


def lines_of(piece: Piece) -> Iterator[Line]:
    """The lines of a piece that are not empty."""
    with open_stream(piece.file) as stream:
        place, number = _first_line(stream, piece.start), 0
        while piece.stop is None or place < piece.stop:
            line = stream.readline(MAX_LINE_BYTES)
            if not line:
                break
            number += 1
            length, complete = len(line), line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
            if not complete:
                length += _skip_line(stream)
            if not complete or line.strip():
                where = f"line {number}" if not piece.start else f"byte {place}"
                yield f"{piece.file}, {where}", place, line if complete else None
            place += length


def _first_line(stream: IO[bytes], start: int) -> int:
    """Go to the first line that starts at `start` or behind it; its place."""
    if not start:
        return 0
    stream.seek(start - 1)
    return start - 1 + _skip_line(stream)


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of the line; how many bytes that were."""
    skipped = 0
    while chunk := stream.readline(_CHUNK):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def split_stream(stream: IO[bytes], separator: bytes) -> Iterator[tuple[int, bytes | None]]:
    """What stands between separators, with its place; `None` for a part of more than `MAX_LINE_BYTES`."""
    place, waiting, lost = 0, b"", 0
    while chunk := stream.read(_CHUNK):
        *parts, waiting = (waiting + chunk).split(separator)
        for part in parts:
            yield place, None if lost or len(part) > MAX_LINE_BYTES else part
            place, lost = place + lost + len(part) + len(separator), 0
        if len(waiting) > MAX_LINE_BYTES:  # keep only what may be the beginning of a separator
            keep = len(separator) - 1
            lost, waiting = lost + len(waiting) - keep, waiting[len(waiting) - keep :]
    yield place, None if lost else waiting
