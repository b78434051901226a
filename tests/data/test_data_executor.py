import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from bloomery import config as configs
from bloomery.data import executor, prepare
from bloomery.data.dataset import read_rows
from bloomery.data.document import Drops
from bloomery.data.part import Record, Worker
from bloomery.data.prepare import PrepareConfig
from bloomery.errors import ArtifactError, ConfigError

TEXTS = [f"text {number % 80} {'again ' * (number % 9)}" for number in range(200)]


@pytest.fixture
def settings(tmp_path):
    """Two sources of many parts, with duplicates inside and across, drops and a limit."""
    lines = [json.dumps({"text": text, "id": number}) for number, text in enumerate(TEXTS)]
    for name, chosen in (
        ("a", lines),
        ("b", [*lines[50:], "{", *(line.replace("text", "other", 2) for line in lines)]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(chosen))
    sources = [
        {"type": "jsonl", "name": "a", "path": str(tmp_path / "a.jsonl"), "max_documents": 70},
        {"type": "jsonl", "name": "b", "path": str(tmp_path / "b.jsonl"), "columns": {"text": "other"}},
    ]
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text().replace('"text"', '"other"'))
    return {"kind": "documents", "sources": sources, "filters": {"max_characters": 50}}


def prepared(settings, out, **more):
    manifest = prepare.run(configs.build(PrepareConfig, {**settings, **more}), out)
    files = {file.name: file.read_bytes() for file in (out / "data").iterdir()}
    return manifest.summary, list(read_rows(out, "documents")), files


def test_how_the_input_is_cut_changes_nothing(settings, tmp_path):
    whole = prepared(settings, tmp_path / "whole")
    counts = whole[0]["sources"]
    assert counts["a"]["kept"] == 70
    assert counts["b"]["dropped"]["invalid JSON"] == 1
    assert counts["a"]["dropped"]["longer than 50 characters"]
    assert counts["b"]["dropped"]["duplicate"]
    for part_bytes in (500, 2997):
        assert prepared(settings, tmp_path / f"{part_bytes}", part_bytes=part_bytes)[:2] == whole[:2]


def test_a_run_that_was_cut_goes_on_and_gives_the_same(settings, tmp_path, monkeypatch):
    expected = prepared(settings, tmp_path / "expected", part_bytes=2000)
    run, worked = Worker.run, []

    def cut(self, job):
        worked.append((job.source, job.number))
        if len(worked) == 4:
            raise KeyboardInterrupt
        run(self, job)

    monkeypatch.setattr(Worker, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        prepared(settings, tmp_path / "out", part_bytes=2000)
    assert not (tmp_path / "out" / "manifest.json").exists()
    part = tmp_path / "out" / "work" / "0-a" / "000001.parquet"
    part.write_bytes(part.read_bytes()[:-9])  # as if the power went before it reached the disk
    again = prepared(settings, tmp_path / "out", part_bytes=2000)
    assert again == expected
    assert {job for job in worked if worked.count(job) > 1} == {(0, 1), worked[3]}
    assert not (tmp_path / "out" / "work").exists()


def test_parts_cut_another_way_are_done_anew(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("bloomery.data.prepare.Merge.source", lambda *_: next(iter(_[3])) and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(settings, tmp_path / "out", part_bytes=2000)
    assert prepared(settings, tmp_path / "out", part_bytes=1700)[:2] == prepared(settings, tmp_path / "new")[:2]


def test_processes_give_the_same(settings, tmp_path):
    expected = prepared(settings, tmp_path / "one", part_bytes=3000)
    assert prepared(settings, tmp_path / "two", part_bytes=3000, executor={"workers": 2}) == expected


@pytest.mark.slow
def test_errors_of_processes_are_shown(settings, tmp_path):
    settings["sources"][1]["on_invalid"] = "error"
    with pytest.raises(ArtifactError, match=r"b\.jsonl, .*: not JSON: .*repair it"):
        prepared(settings, tmp_path / "bad", part_bytes=3000, executor={"workers": 2})


@pytest.mark.slow
def test_after_sigkill_the_same_command_gives_the_same(settings, tmp_path):
    expected = prepared(settings, tmp_path / "expected")
    (tmp_path / "config.yaml").write_text(configs.to_yaml({**settings, "part_bytes": 300, "executor": {"workers": 2}}))
    command = [
        sys.executable,
        "-m",
        "bloomery",
        "prepare",
        str(tmp_path / "config.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    killed = 0
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list((tmp_path / "out").rglob("*.parquet")))
        while process.poll() is None and len(list((tmp_path / "out").rglob("*.parquet"))) < before + 8:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed >= 2
    assert process.returncode == 0
    assert list(read_rows(tmp_path / "out", "documents")) == expected[1]


def test_sizes_decide_how_many_processes():
    config = executor.ExecutorConfig()
    assert executor.num_processes(config, 100, 10) == 1
    assert 1 <= executor.num_processes(config, 2, 10**9) <= 2
    assert executor.num_processes(executor.ExecutorConfig(workers=7), 1, 0) == 7


def test_a_record_knows_what_came_before_a_candidate():
    record = Record()
    for number in range(5):
        record.add("short", str(number))
    record.passed = 2
    record.add("long")
    assert [(before, reason, example) for before, reason, example in record.events] == [
        (0, "short", "0"), (0, "short", "1"), (0, "short", "2"), (0, "short", ""), (0, "short", ""), (2, "long", ""),
    ]  # fmt: skip
    assert isinstance(record, Drops)


class FakeCluster:
    """datatrove's executor as far as we use it: notes its settings and runs the ranks that it shall, in order."""

    submitted: list["FakeCluster"] = []
    ranks = None

    def __init__(self, pipeline, tasks, **settings):
        self.pipeline, self.tasks, self.settings, self.job_id = pipeline, tasks, settings, None

    def run(self):
        self.submitted.append(self)
        self.job_id = "4711"
        for rank in range(self.tasks) if self.ranks is None else self.ranks:
            self.pipeline[0](None, rank, self.tasks)


@pytest.fixture
def cluster(monkeypatch):
    fake = type("Fake", (FakeCluster,), {"submitted": []})
    module = types.ModuleType("datatrove.executor")
    module.SlurmPipelineExecutor = module.RayPipelineExecutor = fake
    package = types.ModuleType("datatrove")
    package.executor = module
    monkeypatch.setitem(sys.modules, "datatrove", package)
    monkeypatch.setitem(sys.modules, "datatrove.executor", module)
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    return fake


SLURM = {"type": "slurm", "tasks": 3, "workers": 2, "cpus_per_task": 2, "memory_gb_per_cpu": 8,
         "slurm": {"partition": "cpu", "time": "1:00:00", "sbatch_args": {"account": "me"}}}  # fmt: skip


def test_slurm_is_told_what_was_asked_for_and_gives_the_same(settings, tmp_path, cluster):
    expected = prepared(settings, tmp_path / "one", part_bytes=3000)
    assert prepared(settings, tmp_path / "out", part_bytes=3000, executor=SLURM) == expected
    [job] = cluster.submitted
    assert job.tasks == 3
    assert job.settings == {
        "workers": 2, "logging_dir": str((tmp_path / "out" / "datatrove").resolve()), "skip_completed": False,
        "cpus_per_task": 2, "mem_per_cpu_gb": 8, "partition": "cpu", "time": "1:00:00", "qos": "normal",
        "env_command": None, "sbatch_args": {"account": "me"}, "job_name": "bloomery-prepare",
    }  # fmt: skip


def test_what_a_cluster_left_undone_is_named_and_submitted_again(settings, tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')  # knows the job no longer
    squeue.chmod(0o755)
    cluster.ranks = [0, 2]
    with pytest.raises(
        ArtifactError, match="the cluster left [0-9]+ of [0-9]+ parts undone; its logs are in .*datatrove"
    ):
        prepared(settings, tmp_path / "out", part_bytes=3000, executor=SLURM)
    assert (tmp_path / "asked").read_text() == "--noheader --jobs 4711\n"
    cluster.ranks = None
    expected = prepared(settings, tmp_path / "one", part_bytes=3000)
    assert prepared(settings, tmp_path / "out", part_bytes=3000, executor=SLURM) == expected
    first, second = (len(job.pipeline[0].jobs) for job in cluster.submitted)
    assert second < first


def test_ray_needs_no_partition(settings, tmp_path, cluster):
    expected = prepared(settings, tmp_path / "one", part_bytes=3000)
    assert prepared(settings, tmp_path / "out", part_bytes=3000, executor={"type": "ray", "tasks": 4}) == expected
    assert set(cluster.submitted[0].settings) == {
        "workers", "logging_dir", "skip_completed", "cpus_per_task", "mem_per_cpu_gb",
    }  # fmt: skip


def test_ray_itself_is_asked_for(cluster, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"ray is not installed; pip install 'bloomery\[data,ray\]'"):
        executor.check(executor.ExecutorConfig(type="ray"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "slurm"}, "executor.slurm: missing; name at least its partition"),
        ({"type": "ray", "slurm": {"partition": "x"}}, "executor.slurm: has no effect with executor.type ray"),
        ({"tasks": 7}, "executor: tasks, cpus_per_task and memory_gb_per_cpu are for clusters"),
        ({"type": "ray"}, r"executor.type: .* datatrove, which is not installed; pip install 'bloomery\[data\]'"),
    ],
)
def test_settings_that_cannot_be_used(settings, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(ConfigError, match=message):
        executor.check(configs.build(executor.ExecutorConfig, settings))
