"""What is saved comes back bit for bit; what is torn, damaged or refused by the disk costs no finished work."""

import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_training import loop, new_state, stream
from torch.distributed.checkpoint.state_dict import get_state_dict

from bloomery import artifact
from bloomery.errors import ArtifactError
from bloomery.train.checkpoint import Checkpoints
from bloomery.train.loop import steps
from bloomery.train.losses import next_token

NO_CHECKSUMS = "incomplete, checksums.json is missing or damaged"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(config, state=None):
    state = state or new_state(config)
    for _ in steps(state, stream(state.position, config), next_token, config):
        pass
    return state


def everything(state):
    moments = [
        value
        for parameter in state.model.parameters()
        for _, value in sorted(state.optimizer.state.get(parameter, {}).items())
    ]
    return [*state.model.state_dict().values(), *moments]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))


def folders(path):
    return sorted(p.name for p in path.iterdir())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints after steps 2, 4 and 6, of which two are kept; and the state after 6."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state = new_state(loop(max_steps=2))
        for last in (2, 4, 6):
            state.extra = {"epoch": last, "names": ["a", "b"]}
            checkpoints.save(trained(loop(max_steps=last, schedule="constant"), state))
        checkpoints.wait()
        yield checkpoints, state


def test_a_checkpoint_restores_everything(saved):
    checkpoints, state = saved
    other = new_state(loop(), seed=9)
    assert checkpoints.load_latest(other)
    assert (other.step, other.position, other.extra) == (6, 24, {"epoch": 6, "names": ["a", "b"]})
    assert same(state, other)
    config = loop(max_steps=9, schedule="constant")
    assert same(trained(config, state), trained(config, other))


def test_two_are_kept(saved):
    assert folders(saved[0].directory) == ["step-00000004", "step-00000006"]


def test_none_to_load_leaves_the_state_alone(tmp_path):
    state = new_state(loop())
    assert not Checkpoints(tmp_path / "none").load_latest(state)
    assert state.step == 0
    assert not state.optimizer.state


def test_training_goes_on_while_a_copy_is_written(tmp_path):
    config = loop(max_steps=3, schedule="constant")
    state = trained(config)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        trained(loop(max_steps=8, schedule="constant"), state)  # changes every tensor at once
    other = new_state(config)
    Checkpoints(tmp_path).load_latest(other)
    assert same(other, trained(config))


def _truncate(folder):
    (data,) = folder.glob("*.distcp")
    os.truncate(data, data.stat().st_size // 2)


def _flip_a_bit(folder):
    (data,) = folder.glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_truncate, "damaged, the content of __0_0.distcp has changed"),
        (_flip_a_bit, "damaged, the content of __0_0.distcp has changed"),
        (lambda folder: (folder / "checksums.json").unlink(), NO_CHECKSUMS),
        (
            lambda folder: (folder / "checksums.json").write_text("{"),
            NO_CHECKSUMS,
        ),
        (lambda folder: (folder / "state.json").unlink(), "incomplete, state.json is missing"),
    ],
    ids=["truncated", "bit flipped", "no checksums", "torn checksums", "no state"],
)
def test_a_damaged_checkpoint_is_passed_over(saved, capsys, harm, message):
    checkpoints, _ = saved
    harm(checkpoints.directory / "step-00000006")
    state = new_state(loop(), seed=9)
    assert checkpoints.load_latest(state)
    assert state.step == 4
    assert same(state, trained(loop(max_steps=4, schedule="constant")))
    assert message in capsys.readouterr().err
    assert folders(checkpoints.directory) == ["step-00000004"]


def test_when_all_are_damaged_training_starts_anew(saved):
    checkpoints, _ = saved
    for folder in checkpoints.directory.iterdir():
        _truncate(folder)
    assert not checkpoints.load_latest(new_state(loop()))


def test_half_written_folders_of_a_killed_process_are_cleared(saved):
    checkpoints, _ = saved
    (checkpoints.directory / ".step-00000008.123.tmp").mkdir()
    assert checkpoints.load_latest(new_state(loop()))
    assert folders(checkpoints.directory) == ["step-00000004", "step-00000006"]


def test_another_model_is_refused(saved, tmp_path):
    checkpoints, _ = saved
    state = new_state(loop())
    state.model.extra_layer = torch.nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match=r"06: does not fit this model: .*extra_layer.*remove the stage's folder"):
        checkpoints.load_latest(state)


@contextmanager
def full_disk():
    """No file may grow beyond 2 kB: writing fails as on a full disk, inside the real write.

    A context and not a fixture: pytest's own report may go to a file, and must not meet the limit.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_artifact_error_and_nothing_is_lost(saved):
    checkpoints, state = saved
    trained(loop(max_steps=8, schedule="constant"), state)
    with full_disk():
        checkpoints.save(state)
        with pytest.raises(ArtifactError, match=r"step-00000008: cannot write: .*free space"):
            checkpoints.wait()
    assert folders(checkpoints.directory) == ["step-00000004", "step-00000006"]
    other = new_state(loop())
    assert checkpoints.load_latest(other)
    assert other.step == 6


def test_a_rename_that_fails_loses_nothing(saved, monkeypatch):
    checkpoints, state = saved
    state.step = 8

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.os, "replace", refuse)
    checkpoints.save(state)
    with pytest.raises(ArtifactError, match="cannot write: No space left on device"):
        checkpoints.save(state)  # the failure of the write before shows here
    assert folders(checkpoints.directory) == ["step-00000004", "step-00000006"]


def test_checkpoints_of_earlier_versions_are_read(tmp_path):
    """They were written from torch's own state dicts, in one process."""
    state = trained(loop(max_steps=3, schedule="constant"))
    folder = tmp_path / "step-00000003"
    model, optimizer = get_state_dict(state.model, state.optimizer)
    tensors = {"model": model, "optimizer": optimizer, "random": torch.get_rng_state()}
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    artifact.write_json(folder / "state.json", {"step": 3, "position": 12, "extra": {}})
    checksums = {file.name: artifact.file_digest(file) for file in sorted(folder.iterdir())}
    artifact.write_json(folder / "checksums.json", checksums)
    other = new_state(loop(), seed=9)
    assert Checkpoints(tmp_path).load_latest(other)
    assert same(state, other)
    config = loop(max_steps=5, schedule="constant")
    assert same(trained(config, state), trained(config, other))
