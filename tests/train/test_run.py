"""A stage that is killed, interrupted or resumed ends with the numbers of one that was not."""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_training import TinyConfig, loop, train

from bloomery import artifact
from bloomery.artifact import Output
from bloomery.errors import ArtifactError, ConfigError
from bloomery.train import run
from bloomery.train.trackers import Trackers

STEPS = 30
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def processes():
    """Children that start in milliseconds: they are forked from a server that has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bloomery.train.run", "torch._dynamo"])  # the optimizer imports the latter
    return context


def config(**settings):
    return TinyConfig(loop=loop(max_steps=STEPS, checkpoint_every_steps=3, **settings), pause_seconds=0.004)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The run that nobody disturbed."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("untouched") / "stage"
    return train(path, config()), rows(path)


def rows(path):
    """Metrics without wall-clock time."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in artifact.Metrics(path / "metrics.jsonl").read()]


def same_as(untouched, state, path):
    expected, expected_rows = untouched
    assert rows(path) == expected_rows
    assert (state.step, state.position, state.extra) == (expected.step, expected.position, expected.extra)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, state.model.state_dict()[name]), name


def test_rows_of_metrics(untouched):
    _, found = untouched
    assert [row["step"] for row in found if "loss" in row] == list(range(1, STEPS + 1))
    assert set(found[0]) >= {"loss", "loss/0", "grad_norm", "learning_rate", "tokens"}
    assert [row["step"] for row in found if "validation_loss" in row] == [4, 8, 12, 16, 20, 24, 28]


def child(path, die_at=""):
    """Train; kill this very process at a chosen moment of its third checkpoint."""
    torch.manual_seed(0)
    replace, saves = os.replace, []

    def deadly(source, target):
        if Path(target).name.startswith("step-"):
            saves.append(target)
        if len(saves) == 3 and die_at == "before the rename":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if len(saves) == 3 and die_at == "after the rename":
            os.kill(os.getpid(), signal.SIGKILL)

    artifact.os.replace = deadly
    train(path, config())


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_killed_while_saving(processes, untouched, tmp_path, moment):
    process = processes.Process(target=child, args=(tmp_path / "stage", moment))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    same_as(untouched, train(tmp_path / "stage", config()), tmp_path / "stage")


def reached(path):
    """The last step in the metrics."""
    return max((row["step"] for row in rows(path)), default=0)


def wait_for(path, step, alive):
    """Until a run that is alive has come to `step`."""
    while alive() and reached(path) < step:
        time.sleep(0.001)


def test_killed_at_random_moments(processes, untouched, tmp_path):
    path, draw, stops = tmp_path / "stage", random.Random(1), []
    while len(stops) < 3 * STEPS and (not stops or stops[-1] < STEPS):
        process = processes.Process(target=child, args=(path,))
        process.start()
        wait_for(path, reached(path) + draw.randint(1, 6), process.is_alive)
        process.join(draw.uniform(0, 0.01))
        process.kill()
        process.join(60)
        stops.append(reached(path))
    assert any(0 < step < STEPS for step in stops), stops
    torch.manual_seed(0)
    same_as(untouched, train(path, config()), path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_saves(untouched, tmp_path, number, capsys):
    torch.manual_seed(0)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    path = tmp_path / "stage"

    def interrupt():
        wait_for(path, 5, threading.main_thread().is_alive)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train(path, config())
    assert "finishing this step and saving" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    last = rows(tmp_path / "stage")[-1]["step"]
    assert 0 < last < STEPS
    newest = max((tmp_path / "stage" / "checkpoints").iterdir()).name
    assert newest == f"step-{last:08d}"
    same_as(untouched, train(tmp_path / "stage", config()), tmp_path / "stage")
    assert f"tiny  goes on after step {last} of {STEPS}" in capsys.readouterr().err


def test_a_second_interrupt_stops_at_once():
    with run.Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_may_train_too(untouched, tmp_path):
    torch.manual_seed(0)
    thread = threading.Thread(target=train, args=(tmp_path / "stage", config()))
    thread.start()
    thread.join()
    assert rows(tmp_path / "stage") == untouched[1]


def test_a_finished_loop_does_nothing_more(untouched, tmp_path):
    torch.manual_seed(0)
    train(tmp_path / "stage", config())
    same_as(untouched, train(tmp_path / "stage", config()), tmp_path / "stage")


def test_a_changed_setting_is_refused_and_a_run_only_one_is_not(untouched, tmp_path):
    torch.manual_seed(0)
    train(tmp_path / "stage", config())
    with pytest.raises(ArtifactError, match=r"loop\.learning_rate was 0\.01 and is now 0\.02"):
        train(tmp_path / "stage", config(learning_rate=0.02))
    train(tmp_path / "stage", config(log_every_steps=7, activation_checkpointing=True))


def test_tensorboard_gets_every_row(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "stage", TinyConfig(loop=loop(max_steps=4, trackers=["tensorboard"])))
    events = EventAccumulator(str(tmp_path / "stage" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert events.Scalars("grad_norm")[0].value == pytest.approx(rows(tmp_path / "stage")[0]["grad_norm"])


def test_a_missing_tracker_fails_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="trackers: wandb is not installed; run `pip install wandb`"):
        train(tmp_path / "stage", TinyConfig(loop=loop(trackers=["wandb"])))
    assert not (tmp_path / "stage" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_get_every_row_of_one_run(tmp_path, monkeypatch, name):
    """A stand-in with the three calls that both packages share."""
    calls = []
    fake_run = SimpleNamespace(log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("finished"))
    fake = SimpleNamespace(init=lambda **settings: calls.append(settings) or fake_run, __spec__=object())
    monkeypatch.setitem(sys.modules, name, fake)
    output = Output(tmp_path / "stage", "tiny", config())
    with Trackers([name], output, 1) as trackers:
        trackers.log(1, {"loss": 2.0})
    settings, *logged = calls
    assert (settings["project"], settings["resume"]) == ("bloomery", "allow")
    assert logged == [(1, {"loss": 2.0}), "finished"]


def test_saving_does_not_slow_the_next_step_by_the_write(tmp_path, monkeypatch):
    """The loop goes on while a slow disk is written to."""
    write = run.Checkpoints._write
    written = []

    def slow(self, *arguments):
        time.sleep(0.5)
        write(self, *arguments)
        written.append(len(artifact.Metrics(tmp_path / "stage" / "metrics.jsonl").read()))

    monkeypatch.setattr(run.Checkpoints, "_write", slow)
    train(tmp_path / "stage", TinyConfig(loop=loop(max_steps=20, checkpoint_every_steps=10)))
    assert written[0] > 10 + 2  # rows logged when the checkpoint of step 10 was done, validations aside
