import json

import datasets
import pytest

from bloomery import config as configs
from bloomery.data import prepare
from bloomery.data.dataset import read_rows
from bloomery.data.prepare import PrepareConfig
from bloomery.data.table import drops_table
from bloomery.data.tokenizer import train_tokenizer
from bloomery.errors import ArtifactError, ConfigError


def config(*sources, kind="documents", **settings):
    return configs.build(PrepareConfig, {"kind": kind, "sources": list(sources), **settings})


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_drop_is_counted_with_its_reason_in_the_manifest(tmp_path):
    rows = [{"text": t} for t in ["one two", "", "x", "one  two", "a\ud800a", "three four"]]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with open(path, "ab") as file:
        file.write(b'{"text": "\xff"}\n')
    source = {"type": "jsonl", "name": "web", "path": path, "filters": {"min_characters": 2}}
    manifest = prepare.run(config(source), tmp_path / "out")
    assert manifest.kind == "documents"
    assert manifest.summary["sources"]["web"] == {
        "kept": 2,
        "bytes": 17,
        "characters": 17,
        "dropped": {
            "empty": 1, "shorter than 2 characters": 1, "duplicate": 1, "invalid characters": 1, "invalid UTF-8": 1,
        },
    }  # fmt: skip
    assert [(row["text"], row["source"]) for row in read_rows(tmp_path / "out", "documents")] == [
        ("one two", "web"), ("three four", "web"),
    ]  # fmt: skip


def test_a_text_in_two_sources_stays_in_the_first(tmp_path):
    sources = [
        {"type": "jsonl", "name": name, "path": jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in texts])}
        for name, texts in (("a", ["same", "only a"]), ("b", ["same", "only b"]))
    ]
    prepare.run(config(*sources), tmp_path / "out")
    assert [row["text"] for row in read_rows(tmp_path / "out", "documents")] == ["same", "only a", "only b"]
    prepare.run(config(*sources, deduplicate=False), tmp_path / "out2")
    assert len(list(read_rows(tmp_path / "out2", "documents"))) == 4


def test_limits_count_what_is_kept(tmp_path):
    rows = [{"text": t} for t in ["", "a", "a", "b", "c"]]
    source = {"type": "jsonl", "name": "a", "path": jsonl(tmp_path / "a.jsonl", rows), "max_documents": 2}
    prepare.run(config(source), tmp_path / "out")
    assert [row["text"] for row in read_rows(tmp_path / "out", "documents")] == ["a", "b"]


@pytest.mark.parametrize("kind", ["documents", "messages", "prompts"])
def test_generated_problems_in_every_kind(tmp_path, kind):
    source = {"type": "procedural", "name": "math", "task": "chain", "count": 20, "split": "test"}
    manifest = prepare.run(config(source, kind=kind), tmp_path / "out")
    rows = list(read_rows(tmp_path / "out", kind))
    assert manifest.summary["documents"] == len(rows) == 20
    assert all(json.loads(row["metadata"])["split"] == "test" and row["source"] == "math" for row in rows)
    if kind == "documents":
        assert all(row["text"].split("\n")[-1].startswith("\\boxed{") for row in rows)
    if kind == "messages":
        assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
    if kind == "prompts":
        assert all(row["verifier"] == "answer" and row["answer"] and len(row["prompt"]) == 1 for row in rows)
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 20


def test_all_types_of_source_in_one_folder(tmp_path):
    prepare.run(config({"type": "procedural", "name": "math", "task": "chain", "count": 5}), tmp_path / "first")
    (tmp_path / "notes.txt").write_text("a note")
    sources = [
        {"type": "text", "name": "notes", "path": str(tmp_path / "notes.txt")},
        {"type": "stdlib", "name": "code", "max_documents": 3},
        {"type": "stdlib", "name": "docs", "part": "docstrings", "max_documents": 3},
        {"type": "parquet", "name": "again", "path": str(tmp_path / "first")},
        {"type": "hf", "name": "hub", "path": str(tmp_path / "first")},
    ]
    manifest = prepare.run(config(*sources, deduplicate=False), tmp_path / "out")
    assert {name: source["kept"] for name, source in manifest.summary["sources"].items()} == {
        "notes": 1, "code": 3, "docs": 3, "again": 5, "hub": 5,
    }  # fmt: skip


def test_an_empty_result_says_which_filter_dropped_what(tmp_path):
    source = {
        "type": "jsonl",
        "name": "web",
        "path": jsonl(tmp_path / "a.jsonl", [{"text": "a", "id": 1}, {"text": ""}]),
    }
    with pytest.raises(
        ArtifactError, match=r"source web: nothing is left of it; all were dropped: 1 shorter than 9 .*\(1\), 1 empty"
    ):
        prepare.run(config(source, filters={"min_characters": 9}), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    empty = {"type": "jsonl", "name": "web", "path": jsonl(tmp_path / "b.jsonl", [])}
    with pytest.raises(ArtifactError, match="source web: nothing is left of it; it holds no documents"):
        prepare.run(config(empty), tmp_path / "out2")


@pytest.mark.parametrize(
    ("source", "kind", "error", "message"),
    [
        (
            {"type": "text", "name": "a", "path": "nowhere"},
            "documents",
            ArtifactError,
            "nowhere: no such file or folder",
        ),
        (
            {"type": "text", "name": "a", "path": "."},
            "messages",
            ConfigError,
            "plain text gives documents, not messages",
        ),
        ({"type": "stdlib", "name": "a"}, "prompts", ConfigError, "plain text gives documents, not prompts"),
        ({"type": "stdlib", "name": "a/b"}, "documents", ConfigError, "source 'a/b': expected letters"),
        (
            {"type": "procedural", "name": "a", "task": "chian", "count": 1},
            "documents",
            ConfigError,
            "did you mean chain",
        ),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, source, kind, error, message):
    with pytest.raises(error, match=message):
        prepare.run(config(source, kind=kind), tmp_path / "out")


def test_settings_are_checked_by_name(tmp_path):
    with pytest.raises(ConfigError, match="seed is a field of the source, beside options"):
        config({"type": "procedural", "name": "a", "task": "chain", "count": 1, "options": {"seed": 3}})
    with pytest.raises(ConfigError, match="max_documnts: unknown key; did you mean max_documents"):
        config({"type": "stdlib", "name": "a", "max_documnts": 3})
    with pytest.raises(ConfigError, match="sources: a is given twice"):
        prepare.run(config({"type": "stdlib", "name": "a"}, {"type": "stdlib", "name": "a"}), tmp_path / "out")


def test_preparing_twice_gives_the_same_rows(tmp_path):
    source = {"type": "procedural", "name": "math", "task": "chain", "count": 30, "seed": 5}
    for out in ("one", "two"):
        prepare.run(config(source, kind="messages"), tmp_path / out)
    assert list(read_rows(tmp_path / "one", "messages")) == list(read_rows(tmp_path / "two", "messages"))


def test_an_instruction_stands_behind_every_question_and_no_filter_sees_it(tmp_path):
    rows = [{"prompt": question, "answer": "4", "verifier": "answer"} for question in ("What is 2+2 in words?", "2+2?")]
    source = {"name": "x", "type": "jsonl", "path": jsonl(tmp_path / "in.jsonl", rows)}
    asked = config(source, kind="prompts", instruction="Box it, please.", math={"min_words": 4})
    prepare.run(asked, tmp_path / "out")
    [row] = read_rows(tmp_path / "out", "prompts")
    assert row["prompt"][-1]["content"] == "What is 2+2 in words?\n\nBox it, please."
    with pytest.raises(ConfigError, match="instruction: goes behind a question"):
        prepare.check(config(source, instruction="Box it, please."))


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (b'{"text": "fine"}\n{"text": \n', {"invalid JSON": 1}),
        (b'{"text": "fine"}\n{"text": "' + b"y" * 500 + b'"}\n', {"longer than 64 MiB": 1}),
        (b'{"text": "fine"}\n{"text": "\xff"}\n', {"invalid UTF-8": 1}),
        (b'{"text": "fine"}\n{"text": 7}\n{"text": null}\n', {"no text in text": 2}),
        (b'{"text": "fine"}\n"text"\n', {"not a JSON object": 1}),
        (b'{"text": "fine"}\n{"text": " fine\\n"}\n', {"duplicate": 1}),
    ],
)
def test_hostile_lines_are_counted(tmp_path, monkeypatch, content, reasons):
    monkeypatch.setattr("bloomery.data.pieces.MAX_LINE_BYTES", 200)
    (tmp_path / "a.jsonl").write_bytes(content)
    manifest = prepare.run(config({"type": "jsonl", "name": "a", "path": str(tmp_path / "a.jsonl")}), tmp_path / "out")
    assert manifest.summary["sources"]["a"]["dropped"] == reasons
    assert [row["text"] for row in read_rows(tmp_path / "out", "documents")] == ["fine"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "source a: nothing is left of it; it holds no documents"),
        (
            b'{"content": "fine"}\n',
            r"a.jsonl, line 1: no column 'text'; found content; name it with columns: \{text: …\}",
        ),
    ],
)
def test_what_cannot_be_used_at_all_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        prepare.run(config({"type": "jsonl", "name": "a", "path": str(tmp_path / "a.jsonl")}), tmp_path / "out")


def test_repeated_ids_are_made_unique_and_counted(tmp_path):
    rows = [{"text": text, "id": number} for text, number in (("one", 1), ("two", 1), ("three", 1), ("four", 4))]
    source = {"type": "jsonl", "name": "a", "path": jsonl(tmp_path / "a.jsonl", rows)}
    manifest = prepare.run(config(source), tmp_path / "out")
    assert manifest.summary["sources"]["a"]["repeated_ids"] == 2
    assert [row["id"] for row in read_rows(tmp_path / "out", "documents")] == ["1", "1-2", "1-3", "4"]


def test_near_duplicates_go_within_and_across_sources(tmp_path):
    words = [f"w{chr(97 + number % 26)}{chr(97 + number // 26)}" for number in range(120)]
    texts = {"a": [words, [*words[:-1], "other"]], "b": [["first", *words[1:]], list(reversed(words))]}
    sources = [
        {"type": "jsonl", "name": name, "license": "CC0",
         "path": jsonl(tmp_path / f"{name}.jsonl", [{"text": " ".join(each)} for each in found])}
        for name, found in texts.items()
    ]  # fmt: skip
    manifest = prepare.run(config(*sources, near_duplicates={"threshold": 0.7}), tmp_path / "out")
    assert {name: each["dropped"] for name, each in manifest.summary["sources"].items()} == {
        "a": {"near duplicate": 1}, "b": {"near duplicate": 1},
    }  # fmt: skip
    assert manifest.summary["inventory"]["b"]["license"] == "CC0"


def test_tokens_and_languages_are_counted(tmp_path):
    german = "Der Hund ist nicht im Haus und die Katze auch nicht."
    rows = [{"text": "The cat is in the house and the dog is not."}, {"text": german}]
    train_tokenizer([german], 300).save(tmp_path / "tokenizer")
    source = {"type": "jsonl", "name": "a", "path": jsonl(tmp_path / "a.jsonl", rows)}
    settings = {"language": True, "tokenizer": str(tmp_path / "tokenizer")}
    held = prepare.run(config(source, **settings), tmp_path / "out").summary["inventory"]["a"]
    assert held["languages"] == {"en": 1, "de": 1}
    assert held["documents"] == 2
    assert 20 < held["tokens"] < held["bytes"] == sum(len(row["text"]) for row in rows)
    found = [json.loads(row["metadata"])["language"] for row in read_rows(tmp_path / "out", "documents")]
    assert found == ["en", "de"]


def test_the_table_shows_reads_and_reasons_by_source():
    dropped = {f"reason {number}": number for number in range(1, 15)}
    sources = {
        f"s{number}": {"kept": 1000 * number, "dropped": dropped if number == 1 else {}} for number in range(1, 8)
    }
    first, second = drops_table(sources).split("\n\n")
    assert first.splitlines()[1].split() == ["read", "1,105", "2,000", "3,000", "4,000", "5,000", "6,000"]
    assert "  reason 14" in first
    assert first.splitlines()[-1].split() == ["2", "other", "reasons", "3", "–", "–", "–", "–", "–"]
    assert second.splitlines() == ["         s7", "read  7,000", "kept  7,000"]
