import errno
import json
import os

import pytest

from bloomery import artifact
from bloomery.artifact import Output
from bloomery.config import Config, DatasetDir
from bloomery.errors import ArtifactError


class Settings(Config):
    steps: int = 1
    data: DatasetDir | None = None
    seed: int = 0


def finish(path, **settings):
    with Output(path, "toy", Settings(**settings)) as output:
        return output.finish("documents", {"rows": 3})


def test_manifest_is_written_last_and_means_done(tmp_path):
    with Output(tmp_path / "a", "toy", Settings()) as output:
        assert not output.done
        assert not (tmp_path / "a" / "manifest.json").exists()
        output.finish("documents")
        assert output.done
    assert not Output(tmp_path / "a", "toy", Settings(steps=2)).done


def test_other_settings_are_refused_by_name_and_nothing_changes(tmp_path):
    finish(tmp_path / "a")
    before = (tmp_path / "a" / "config.yaml").read_text()
    with (
        pytest.raises(ArtifactError, match=r"steps was 1 and is now 2.*Nothing was overwritten"),
        Output(tmp_path / "a", "toy", Settings(steps=2)),
    ):
        pass
    assert (tmp_path / "a" / "config.yaml").read_text() == before


def test_half_done_work_with_other_settings_is_refused_too(tmp_path):
    with Output(tmp_path / "a", "toy", Settings()):
        pass
    with pytest.raises(ArtifactError, match="steps was 1"), Output(tmp_path / "a", "toy", Settings(steps=2)):
        pass
    with Output(tmp_path / "a", "toy", Settings()) as output:  # the same settings resume
        assert not output.done


def test_a_changed_input_is_named(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "x.parquet").write_text("one")
    finish(tmp_path / "a", data=data)
    (data / "x.parquet").write_text("two")
    with (
        pytest.raises(ArtifactError, match="the content of input data has changed"),
        Output(tmp_path / "a", "toy", Settings(data=data)),
    ):
        pass


def test_foreign_folders_and_other_stages_are_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="not written by bloomery"), Output(tmp_path / "mine", "toy", Settings()):
        pass
    finish(tmp_path / "a")
    with pytest.raises(ArtifactError, match="holds stage 'toy'"), Output(tmp_path / "a", "other", Settings()):
        pass


def test_one_writer_a_folder(tmp_path):
    with (
        Output(tmp_path / "a", "toy", Settings()),
        pytest.raises(ArtifactError, match="another process"),
        Output(tmp_path / "a", "toy", Settings()),
    ):
        pass


def test_resolve_checks_kind_and_completion(tmp_path):
    finish(tmp_path / "a")
    assert artifact.resolve(tmp_path / "a", "dataset") == tmp_path / "a"
    with pytest.raises(ArtifactError, match="holds documents, expected a model"):
        artifact.resolve(tmp_path / "a", "model")
    with Output(tmp_path / "b", "toy", Settings()):
        pass
    with pytest.raises(ArtifactError, match="has not finished"):
        artifact.resolve(tmp_path / "b", "dataset")
    with pytest.raises(ArtifactError, match="no such folder"):
        artifact.resolve(tmp_path / "c", "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"no config.json here; expected a model"):
        artifact.resolve(tmp_path / "empty", "model")


def test_key_follows_content_not_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.parquet").write_text("same")
    first, second = (finish(tmp_path / f"out-{name}", data=tmp_path / name) for name in ("one", "two"))
    assert first.key == second.key


def test_damaged_manifest_is_explained(tmp_path):
    finish(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text('{"kind":')
    with pytest.raises(ArtifactError, match="damaged JSON"):
        artifact.read_manifest(tmp_path / "a")


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    artifact.write_text(tmp_path / "f", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtifactError, match="No space left on device.*run the same command to continue"):
        artifact.write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_metrics_survive_a_torn_line_and_rewind(tmp_path):
    metrics = artifact.Metrics(tmp_path / "metrics.jsonl")
    for step in range(1, 5):
        metrics.log(step, loss=1 / step)
    with metrics.path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in metrics.read()] == [1, 2, 3, 4]
    metrics.rewind(2)
    assert metrics.path.read_text().splitlines() == [json.dumps({"step": s, "loss": 1 / s}) for s in (1, 2)]


def test_seconds_add_up_over_attempts(tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 100.0, 107.0])
    monkeypatch.setattr(artifact.time, "monotonic", lambda: next(clock))
    with Output(tmp_path / "a", "toy", Settings()):
        pass
    with Output(tmp_path / "a", "toy", Settings()) as output:
        assert output.finish("documents").seconds == 12.0


def test_raw_input_counts_by_size_and_time_of_change(tmp_path):
    file = tmp_path / "raw.txt"
    file.write_text("one")
    before = artifact.digest(artifact.resolve(file, "raw"), "raw")
    assert before == artifact.digest(file, "raw")
    os.utime(file, (1, 1))
    assert before != artifact.digest(file, "raw")
    with pytest.raises(ArtifactError, match="no such file or folder"):
        artifact.resolve(tmp_path / "lost.txt", "raw")
