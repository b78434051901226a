import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bloomery.data import read
from bloomery.data.dataset import write_rows
from bloomery.errors import ArtifactError

BAD = b"good \xff bad"


@pytest.fixture
def invalid():
    return read.Invalid()


@pytest.fixture
def strict():
    return read.Invalid("error")


def documents(rows, invalid, kind="documents", columns=None, **constants):
    return list(read.to_documents(rows, kind, columns or {}, constants, invalid))


def test_text_files_in_name_order(tmp_path, invalid):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("sub/c.txt", "third"), ("d.md", "other")):
        (tmp_path / name).write_text(text)
    found = list(read.read_text(tmp_path, "**/*.txt", None, invalid))
    assert [(d.text, d.metadata) for d in found] == [
        ("first", {"file": "a.txt"}), ("second", {"file": "b.txt"}), ("third", {"file": "c.txt"}),
    ]  # fmt: skip
    assert [d.text for d in read.read_text(tmp_path / "d.md", "**/*.txt", None, invalid)] == ["other"]


def test_a_file_can_hold_several_documents(tmp_path, invalid):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    assert [d.text for d in read.read_text(tmp_path, "*.txt", "\n\n", invalid)] == ["one", "two", "three"]


def test_missing_files_are_named(tmp_path, invalid):
    with pytest.raises(ArtifactError, match="nowhere: no such file or folder"):
        list(read.read_text(tmp_path / "nowhere", "*", None, invalid))
    with pytest.raises(ArtifactError, match=r"no file matches '\*\.txt'"):
        list(read.read_text(tmp_path, "*.txt", None, invalid))


def test_text_that_is_not_utf8_is_counted_or_named_with_its_byte(tmp_path, invalid, strict):
    (tmp_path / "a.txt").write_bytes(BAD)
    (tmp_path / "b.txt").write_text("fine")
    assert [d.text for d in read.read_text(tmp_path, "*", None, invalid)] == ["fine"]
    assert invalid.drops.counts == {"invalid UTF-8": 1}
    with pytest.raises(
        ArtifactError, match=r"a\.txt: byte 5 \(0xff\) is not UTF-8; repair it, or set on_invalid: drop"
    ):
        list(read.read_text(tmp_path, "*", None, strict))


def test_jsonl_lines_that_cannot_be_read(tmp_path, invalid, strict):
    lines = [b'{"text": "one"}', b'{"text": "' + BAD + b'"}', b"", b'{"text": ', b"[1]", b'{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert [d.text for d in documents(read.read_jsonl(tmp_path, "*.jsonl", invalid), invalid)] == ["one", "two"]
    assert invalid.drops.counts == {"invalid UTF-8": 1, "invalid JSON": 1, "not a JSON object": 1}
    with pytest.raises(ArtifactError, match=r"a\.jsonl, line 2: byte 31 \(0xff\) is not UTF-8"):
        list(read.read_jsonl(tmp_path, "*.jsonl", strict))


def test_parquet_strings_that_are_not_utf8(tmp_path, invalid, strict):
    column = pa.array([b"one", BAD, b"two"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert [d.text for d in documents(read.read_parquet(tmp_path, "*.parquet", invalid), invalid)] == ["one", "two"]
    assert invalid.drops.examples == {"invalid UTF-8": [f"{tmp_path / 'a.parquet'}, row 1"]}
    with pytest.raises(ArtifactError, match=r"a\.parquet, row 1: byte 5 of a string is not UTF-8"):
        list(read.read_parquet(tmp_path, "*.parquet", strict))


def test_wrong_column_names_are_shown_with_those_found(invalid):
    with pytest.raises(
        ArtifactError, match=r"f, row 0: no column 'text'; found content, id; name it with columns: \{text: …\}"
    ):
        documents([("f, row 0", {"content": "a", "id": 1})], invalid)
    found = documents([("f, row 0", {"content": "a", "id": 1})], invalid, columns={"text": "content"})
    assert [(d.text, d.id) for d in found] == [("a", "1")]


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("documents", {"text": None}, "no text in text"),
        ("messages", {"messages": []}, "no messages"),
        ("messages", {"messages": [{"role": "user"}]}, "a message without text in role and content"),
        ("prompts", {"prompt": "a", "answer": None, "verifier": "answer"}, "no text in answer"),
    ],
)
def test_unusable_values_are_counted_or_an_error(kind, row, reason, invalid, strict):
    assert documents([("f, row 7", row)], invalid, kind) == []
    assert invalid.drops.examples == {reason: ["f, row 7"]}
    with pytest.raises(ArtifactError, match=f"f, row 7: {reason}"):
        documents([("f, row 7", row)], strict, kind)


def test_chats_in_the_forms_that_people_use(invalid):
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [("1", {"prompt": "q", "completion": "a"}), ("2", {"prompt": [user], "completion": [assistant]})]
    for document in documents([*rows, ("3", {"messages": [user, assistant]})], invalid, "messages"):
        assert document.columns == {"messages": [user, assistant]}
        assert document.text == "q\na"
    (prompt,) = documents([("4", {"prompt": "q", "answer": 4})], invalid, "prompts", verifier="answer")
    assert prompt.columns == {"prompt": [user], "answer": "4", "verifier": "answer"}


def test_metadata_is_kept_whatever_its_form(invalid):
    rows = [("", {"text": "a", "metadata": value}) for value in ({"k": 1}, '{"k": 1}', "free text", None)]
    assert [dict(d.metadata) for d in documents(rows, invalid)] == [{"k": 1}, {"k": 1}, {"metadata": "free text"}, {}]


def test_hugging_face_datasets_from_a_folder(tmp_path, invalid):
    write_rows(tmp_path, "a", [{"text": "one"}, {"text": "two"}], "documents")
    rows = read.read_hf(str(tmp_path), None, "train", None)
    assert [d.text for d in documents(rows, invalid)] == ["one", "two"]
    with pytest.raises(ArtifactError, match="`datasets` cannot load it"):
        list(read.read_hf(str(tmp_path), None, "nosuchsplit", None))
    with pytest.raises(ArtifactError, match="`datasets` cannot load it"):
        list(read.read_hf(str(tmp_path / "none"), None, "train", None))


def test_the_standard_library_is_real_text_in_a_fixed_order(invalid):
    root = Path(sysconfig.get_path("stdlib"))
    found = [next(iterator) for iterator in [read.read_stdlib("sources", invalid)] for _ in range(30)]
    assert [d.id for d in found] == [
        d.id for _, d in zip(range(30), read.read_stdlib("sources", invalid), strict=False)
    ]
    modules = {d.metadata["module"] for d in found}
    assert len({module.split(".")[0][0] for module in modules}) > 5  # a sample, not the first of the alphabet
    assert not any("test" in module.split(".") for module in modules)
    for document in found[:5]:
        path = root / document.metadata["module"].replace(".", "/")
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        assert document.text == file.read_text(encoding="utf-8")


def test_docstrings_are_documents_of_their_own():
    method = '    def f(self):\n        """Does f."""\n'
    source = '"""Top."""\nclass A:\n    """A class.\n\n    More.\n    """\n' + method
    assert list(read._docs(source, "m")) == [("m", "Top."), ("m.A", "A class.\n\nMore."), ("m.A.f", "Does f.")]
    assert list(read._docs("not python at all", "m")) == []


def test_json_escapes_of_half_surrogates_do_not_stop_a_source(tmp_path, invalid):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x\ud800"}) + "\n")
    (document,) = documents(read.read_jsonl(tmp_path, "*", invalid), invalid)
    assert document.id
