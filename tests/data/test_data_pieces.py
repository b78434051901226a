import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bloomery.data import pieces, read
from bloomery.data.pieces import Piece, files_in, in_parts, line_pieces, whole_files
from bloomery.data.sources import HfSource, JsonlSource, ParquetSource, StdlibSource, TextSource
from bloomery.errors import ArtifactError

ROWS = [{"text": f"row {number} " + "x" * (number % 7)} for number in range(50)]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(source, part_bytes=None):
    invalid = read.Invalid("error")
    if part_bytes is None:
        return [document.text for document in source.documents("documents", invalid)]
    parts = source.parts(part_bytes)
    return [document.text for part in parts for document in source.documents_of(part, "documents", invalid)]


@pytest.mark.parametrize("part_bytes", [1, 7, 40, 333, 10**6])
def test_every_line_is_in_one_piece_however_a_file_is_cut(tmp_path, part_bytes):
    (tmp_path / "a.jsonl").write_bytes(lines() + b"\n\n" + lines()[:-1])
    (tmp_path / "b.jsonl").write_bytes(b"")
    source = JsonlSource(name="a", path=tmp_path)
    assert texts(source, part_bytes) == texts(source) == [row["text"] for row in ROWS] * 2


def test_small_files_share_a_part_and_large_ones_are_cut(tmp_path):
    for name, size in (("a", 3), ("b", 3), ("c", 25)):
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * size)
    files = files_in(tmp_path, "*.jsonl")
    spans = [
        [(piece.file.stem, piece.start, piece.stop) for piece in part] for part in in_parts(line_pieces(files, 10), 10)
    ]
    assert spans == [[("a", 0, None), ("b", 0, None)], [("c", 0, 10)], [("c", 10, 20)], [("c", 20, 25)]]
    assert [len(part) for part in in_parts(whole_files(files), 5)] == [1, 1, 1]
    assert in_parts([], 5) == []


def test_row_groups_and_shards_are_parts(tmp_path):
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / f"{name}.parquet", row_group_size=20)
    source = ParquetSource(name="a", path=tmp_path)
    assert [(piece.start, piece.stop) for part in source.parts(1) for piece in part] == [(0, 1), (1, 2), (2, 3)] * 2
    assert texts(source, 1) == texts(source, 600) == texts(source)
    where = [where for where, _ in source.rows_of(source.parts(1)[1], read.Invalid())]
    assert where[0] == f"{tmp_path / 'a.parquet'}, row 20"
    hub = HfSource(name="hub", path=str(tmp_path))
    assert len(hub.parts(1)) == 2
    assert texts(hub, 1) == texts(hub) == texts(source)


def test_the_standard_library_in_parts_is_the_whole_of_it():
    source = StdlibSource(name="code")
    parts = source.parts(1)
    assert len(parts) > 3
    assert [name for part in parts for name in part] == read.stdlib_files()


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".zst", lambda data: pa.Codec("zstd").compress(data).to_pybytes()),
    ],
)
def test_compressed_files_are_found_and_read(tmp_path, suffix, compress):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(lines()))
    (tmp_path / "b.jsonl").write_bytes(lines([{"text": "plain"}]))
    assert texts(JsonlSource(name="a", path=tmp_path), 10) == [row["text"] for row in ROWS] + ["plain"]
    (tmp_path / f"c.txt{suffix}").write_bytes(compress(b"ein Text"))
    assert texts(TextSource(name="a", path=tmp_path)) == ["ein Text"]


def test_a_damaged_file_gives_what_is_before_the_damage_and_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_CHUNK", 4096)
    many = [{"text": f"{number * 7919 % 999_983:06}"} for number in range(20_000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(many))[:-2000])
    invalid = read.Invalid()
    found = list(read.read_jsonl(tmp_path, "*.jsonl", invalid))
    assert 0 < len(found) < len(many)
    assert invalid.drops.counts["damaged file"] == 1
    with pytest.raises(ArtifactError, match=r"a\.jsonl\.gz: damaged: .*repair it, or set on_invalid: drop"):
        list(read.read_jsonl(tmp_path, "*.jsonl", read.Invalid("error")))


@pytest.mark.parametrize("tail", [b"", b"\n"])
def test_a_huge_line_is_passed_over(tmp_path, monkeypatch, tail):
    monkeypatch.setattr(pieces, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(pieces, "_CHUNK", 16)
    huge = json.dumps({"text": "y" * 1000}).encode()
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:2]) + huge + b"\n" + lines(ROWS[2:3]) + huge + tail)
    invalid = read.Invalid()
    assert [row["text"] for _, row in read.read_jsonl(tmp_path, "*", invalid)] == [row["text"] for row in ROWS[:3]]
    assert invalid.drops.examples == {"longer than 64 MiB": [f"{tmp_path / 'a.jsonl'}, line {n}" for n in (3, 5)]}
    for part_bytes in (5, 40, 700):
        parts = in_parts(line_pieces([tmp_path / "a.jsonl"], part_bytes), part_bytes)
        found = [line for part in parts for piece in part for _, _, line in pieces.lines_of(piece)]
        assert [line is None for line in found] == [False, False, True, False, True]


def test_a_huge_part_of_a_text_file_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(pieces, "_CHUNK", 7)
    (tmp_path / "a.txt").write_bytes(b"one<->" + b"y" * 500 + b"<->two<->\xff<->" + b"z" * 500)
    invalid = read.Invalid()
    found = list(read.read_text(tmp_path, "*.txt", "<->", invalid))
    assert [(document.text, document.metadata["part"]) for document in found] == [("one", 0), ("two", 2)]
    assert invalid.drops.counts == {"longer than 64 MiB": 2, "invalid UTF-8": 1}
    with pytest.raises(ArtifactError, match=r"a\.txt, part 3: byte 515 \(0xff\) is not UTF-8"):
        list(read.read_text_files((Piece(tmp_path / "a.txt"),), "<->", _only_utf8()))


def _only_utf8():
    """Stops at bytes that are not UTF-8, and passes over what is too long."""

    class Strict(read.Invalid):
        def __call__(self, where, reason, detail):
            self.on_invalid = "error" if "UTF-8" in reason else "drop"
            super().__call__(where, reason, detail)

    return Strict()


def test_json_nested_too_deeply_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n" + '{"text": "x"}\n')
    invalid = read.Invalid()
    assert [row for _, row in read.read_jsonl(tmp_path, "*", invalid)] == [{"text": "x"}]
    assert invalid.drops.counts == {"invalid JSON": 1}
