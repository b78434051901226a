import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bloomery import artifact
from bloomery.data.dataset import SCHEMAS, kind_of, read_rows, read_texts, write_rows
from bloomery.errors import ArtifactError, ConfigError

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CONTENT = {
    "documents": {"text": "hello\nworld"},
    "messages": {"messages": [USER, ASSISTANT]},
    "prompts": {"prompt": [USER], "answer": "4", "verifier": "answer"},
    "preferences": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "5"}]},
    "traces": {"prompt": [USER], "completion": "4", "answer": "4", "verifier": "answer", "score": 1.0,
               "status": "correct", "reason": "", "tokens": 2, "finish_reason": "stop", "step": 1, "sample": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_kind_round_trips_here_and_through_datasets(tmp_path, kind):
    rows = [{**CONTENT[kind], "id": str(n), "source": "test", "metadata": '{"n": 1}'} for n in range(5)]
    assert write_rows(tmp_path / "d", "test", rows, kind, rows_per_shard=2) == 5
    names = sorted(file.name for file in (tmp_path / "d" / "data").iterdir())
    assert names == ["test-00000.parquet", "test-00001.parquet", "test-00002.parquet"]
    assert list(read_rows(tmp_path / "d", kind)) == rows
    loaded = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 5
    assert loaded["train"]["id"][:] == ["0", "1", "2", "3", "4"]
    assert set(CONTENT[kind]) <= set(loaded["train"].column_names)


def test_a_source_named_like_a_split_does_not_hide_the_others(tmp_path):
    for source in ("test", "web"):
        write_rows(tmp_path, source, [{"text": source}], "documents")
    (tmp_path / "manifest.json").write_text("{}")
    loaded = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["train"]["text"]) == ["test", "web"]


def test_origin_is_filled_in_and_one_source_can_be_read_alone(tmp_path):
    write_rows(tmp_path, "web", [{"text": "a"}, {"text": "b"}], "documents")
    write_rows(tmp_path, "web-2", [{"text": "c"}], "documents")
    assert list(read_rows(tmp_path, "documents", "web")) == [
        {"text": "a", "id": "0", "source": "web", "metadata": "{}"},
        {"text": "b", "id": "1", "source": "web", "metadata": "{}"},
    ]
    with pytest.raises(ArtifactError, match=r"no source 'wiki'; found web, web-2"):
        read_rows(tmp_path, "documents", "wiki")


def test_writing_a_source_again_leaves_no_stale_shard(tmp_path):
    write_rows(tmp_path, "a", [{"text": str(n)} for n in range(5)], "documents", rows_per_shard=2)
    write_rows(tmp_path, "a-b", [{"text": "other"}], "documents")
    write_rows(tmp_path, "a", [{"text": "new"}], "documents", rows_per_shard=2)
    assert [row["text"] for row in read_rows(tmp_path, "documents")] == ["new", "other"]


def test_a_message_may_be_kept_out_of_training(tmp_path):
    chat = [USER, {**ASSISTANT, "train": False}, USER, ASSISTANT]
    write_rows(tmp_path, "a", [{"messages": chat}], "messages")
    assert next(read_rows(tmp_path, "messages"))["messages"] == chat


def test_missing_columns_are_named_with_those_found(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), tmp_path / "data" / "x.parquet")
    with pytest.raises(ArtifactError, match=r"x\.parquet: no column 'text'; found content, url; documents need text"):
        read_rows(tmp_path, "documents")
    with pytest.raises(ArtifactError, match="columns content, url are of no known kind"):
        kind_of(tmp_path)
    with pytest.raises(ArtifactError, match=r"row 0 has no 'answer'; found prompt, verifier"):
        write_rows(tmp_path / "new", "a", [{"prompt": [USER], "verifier": "answer"}], "prompts")
    assert not list((tmp_path / "new" / "data").glob("*"))


def test_values_of_the_wrong_type_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"rows 0 to 0 do not fit \['text'"):
        write_rows(tmp_path, "a", [{"text": 3}], "documents")


def test_unusable_folders_say_what_was_expected(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder; expected a dataset"):
        read_rows(tmp_path / "none", "documents")
    with pytest.raises(ArtifactError, match="no Parquet files; expected data"):
        read_rows(tmp_path, "documents")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a-00000.parquet").write_bytes(b"PAR1 half a file")
    with pytest.raises(ArtifactError, match=r"a-00000\.parquet: not a readable Parquet file"):
        read_rows(tmp_path, "documents")


def test_another_kind_is_refused(tmp_path):
    write_rows(tmp_path, "a", [{"text": "a"}], "documents")
    manifest = artifact.Manifest(kind="documents", stage="prepare", key="k", version="0", seconds=0, finished=0)
    artifact.write_json(tmp_path / "manifest.json", manifest.model_dump(mode="json"))
    with pytest.raises(ArtifactError, match="holds documents, expected messages"):
        read_rows(tmp_path, "messages")
    with pytest.raises(ConfigError, match="kind 'novels': expected one of documents"):
        read_rows(tmp_path, "novels")


def test_a_source_name_must_be_a_file_name(tmp_path):
    with pytest.raises(ConfigError, match=r"source '\.\./x': expected letters"):
        write_rows(tmp_path, "../x", [], "documents")


@pytest.mark.parametrize(
    ("kind", "text"),
    [("documents", "hello\nworld"), ("messages", "2+2?\n4"), ("prompts", "2+2?\n4"), ("preferences", "2+2?\n4")],
)
def test_every_kind_gives_text(tmp_path, kind, text):
    write_rows(tmp_path, "a", [CONTENT[kind]] * 3, kind)
    assert kind_of(tmp_path) == kind
    assert list(read_texts(tmp_path, limit=2)) == [text, text]
