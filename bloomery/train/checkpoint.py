"""Resumable state on disk: written in the background by torch.distributed.checkpoint, whole or not at all, verified.

`checkpoints/step-00000200/` holds the tensors, `state.json` (step, position, extra) and `checksums.json`, written last.
"""

import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from bloomery import artifact
from bloomery.errors import ArtifactError
from bloomery.progress import say
from bloomery.train.loop import TrainState

_CHECKSUMS, _STATE = "checksums.json", "state.json"
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is a choice here


class Checkpoints:
    """The last `keep` good checkpoints of one run. As a context manager, it waits for the write in flight when left."""

    def __init__(self, directory: Path, keep: int = 2):
        self.directory, self.keep = Path(directory), keep
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._in_flight: Future[None] | None = None

    def save(self, state: TrainState) -> None:
        """Copy `state` now and write it in the background.

        Waits for the write before it, so that at most one copy exists. Raises `ArtifactError` if that one failed.
        """
        self.wait()
        plain = {"step": state.step, "position": state.position, "extra": state.extra}
        self._in_flight = self._writer.submit(self._write, state.step, _copy(_tensors(state)), _copy(plain))

    def wait(self) -> None:
        """Return when nothing is in flight. Raises `ArtifactError` when the write failed (disk full, no permission)."""
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def load_latest(self, state: TrainState) -> bool:
        """Restore the newest whole checkpoint into `state`; False when there is none, and `state` is as it was.

        A torn or damaged one is reported, removed and passed over.
        """
        self.wait()
        for torn in self.directory.glob(".*.tmp"):
            shutil.rmtree(torn)
        for folder in reversed(self._folders()):
            problem = _damage(folder)
            if problem is None:
                _restore(folder, state)
                return True
            say(f"{folder}: {problem}; it is removed, and the checkpoint before it is used")
            shutil.rmtree(folder)
        return False

    def _folders(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))

    def _write(self, step: int, tensors: dict[str, Any], plain: dict[str, Any]) -> None:
        with artifact.replacing(self.directory / f"step-{step:08d}") as temporary:
            try:
                dcp.save(tensors, checkpoint_id=temporary, no_dist=True)
            except dcp.CheckpointException as error:  # derives from BaseException and hides the reason inside
                raise _cause(error) from error
            artifact.write_json(temporary / _STATE, plain)
            checksums = {file.name: artifact.file_digest(file) for file in sorted(temporary.iterdir())}
            artifact.write_json(temporary / _CHECKSUMS, checksums)
        with artifact.explained(self.directory):
            for old in self._folders()[: -self.keep]:
                shutil.rmtree(old)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()


def _tensors(state: TrainState) -> dict[str, Any]:
    """Everything that is a tensor, under names that do not depend on how the model is spread over devices."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    return {"model": model, "optimizer": optimizer, "random": torch.get_rng_state()}


def _restore(folder: Path, state: TrainState) -> None:
    plain, tensors = artifact.read_json(folder / _STATE), _tensors(state)
    try:
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    except dcp.CheckpointException as error:
        raise ArtifactError(
            f"{folder}: does not fit this model: {_cause(error)}; remove the stage's folder to start again"
        ) from error
    set_state_dict(
        state.model, state.optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
    )
    torch.set_rng_state(tensors["random"])
    state.step, state.position, state.extra = plain["step"], plain["position"], plain["extra"]


def _cause(error: dcp.CheckpointException) -> Exception:
    reasons = [reason for reason, _ in error.failures.values()]
    refused = (reason for reason in reasons if isinstance(reason, OSError))
    return next(refused, ArtifactError(f"cannot write or read a checkpoint: {reasons[0]}"))


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or `None`."""
    try:
        expected = artifact.read_json(folder / _CHECKSUMS)
    except ArtifactError:
        return f"incomplete, {_CHECKSUMS} is missing or damaged"
    for name, digest in expected.items():
        if not (folder / name).is_file():
            return f"incomplete, {name} is missing"
        if artifact.file_digest(folder / name) != digest:
            return f"damaged, the content of {name} has changed"
    return None


def _copy(value: Any) -> Any:
    """Tensors copied to the CPU, containers rebuilt, so that training may go on while this is written."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
