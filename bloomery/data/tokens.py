"""Packed rows on disk: Arrow files that are memory-mapped, so that one row costs one read."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from bloomery import artifact
from bloomery.data.pack import pack_concatenated, pack_whole, split_long
from bloomery.errors import ArtifactError

WINDOW_TOKENS = 4_000_000
"""Documents are packed this many tokens at a time, so that memory follows the window, not the corpus."""


def shard(folder: Path, source: str) -> Path:
    """The file of a source's rows."""
    return folder / f"{source}-00000.arrow"


class RowWriter:
    """Packs documents into rows of `length` ids and writes them to one file, which appears when the block ends.

    packing: `whole` or `concatenated`, see `pack`. `rows` and `tokens` (padding not counted) say what was written;
    without documents no file is.
    """

    def __init__(self, path: Path, length: int, packing: str, pad_id: int):
        self.path, self.length, self.packing, self.pad_id = path, length, packing, pad_id
        self.rows = self.tokens = 0
        self._window: list[np.ndarray] = []
        self._waiting = 0
        self._files = ExitStack()
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with self._files:  # when the last write fails, no half-written file stays
                self._flush()
        else:
            self._files.__exit__(kind, error, trace)

    def add(self, document: np.ndarray) -> None:
        """One more document, (tokens,) int32."""
        self._window += split_long(document, self.length) if self.packing == "whole" else [document]
        self._waiting += len(document)
        if self._waiting >= WINDOW_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._window:
            return
        pack = pack_whole if self.packing == "whole" else pack_concatenated
        rows, lengths = pack(self._window, self.length, self.pad_id)
        ids = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), self.length)
        batch = pa.record_batch([ids, pa.array(lengths, pa.list_(pa.int32()))], names=["input_ids", "lengths"])
        if self._writer is None:
            temporary = self._files.enter_context(artifact.replacing(self.path))
            self._writer = self._files.enter_context(pa.ipc.new_file(str(temporary), batch.schema))
        self._writer.write_batch(batch)
        self.rows += len(rows)
        self.tokens += int(sum(row.sum() for row in lengths))
        self._window, self._waiting = [], 0


class RowFile:
    """The rows of one file, memory-mapped. `take(row)` copies nothing."""

    def __init__(self, path: Path):
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtifactError(f"{path}: not a readable Arrow file: {error}; run the stage `blend` again") from None
        missing = {"input_ids", "lengths"} - set(table.column_names)
        if missing:
            raise ArtifactError(f"{path}: no column {min(missing)!r}; found {', '.join(table.column_names)}")
        ids, lengths = table.column("input_ids").chunks, table.column("lengths").chunks
        self._ids = [chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in ids]
        self._lengths = [(chunk.values.to_numpy(), chunk.offsets.to_numpy()) for chunk in lengths]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._ids)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def tokens(self) -> np.ndarray:
        """(rows,) tokens of each row, padding not counted."""
        totals = [(np.concatenate([[0], np.cumsum(values)]), offsets) for values, offsets in self._lengths]
        return np.concatenate([np.diff(total[offsets]) for total, offsets in totals])

    def take(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (length,) and document lengths of one row, both int32."""
        chunk = int(np.searchsorted(self._starts, row, "right")) - 1
        place = row - int(self._starts[chunk])
        values, offsets = self._lengths[chunk]
        return self._ids[chunk][place], values[offsets[place] : offsets[place + 1]]
