"""Resumable state on disk: written in the background by all ranks, whole or not at all, verified, for any mapping.

`checkpoints/step-00000200/` holds each rank's tensors, `state.json` (step, position, extra) and `checksums.json`, which
is written last. Names are those of the model in one process, so what one mapping wrote any other reads.
"""

import copy
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bloomery import artifact
from bloomery.errors import ArtifactError, BloomeryError
from bloomery.parallel.pieces import Piece
from bloomery.parallel.world import Peers
from bloomery.progress import say
from bloomery.train import shards
from bloomery.train.loop import TrainState
from bloomery.train.shards import Shard, Shards

_CHECKSUMS, _STATE = "checksums.json", "state.json"
_MODEL, _OPTIMIZER, _RANDOM = "model.", "optimizer.state.", "random"
T = TypeVar("T")
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # every rank reads for itself


class Checkpoints:
    """The last `keep` good checkpoints of one run, and those after `branch_steps`, which stay for runs that branch off.

    As a context manager, it waits for the write in flight when left.
    All ranks make it and call it together.
    """

    def __init__(self, directory: Path, keep: int = 2, branch_steps: Iterable[int] = ()):
        self.directory, self.keep, self.branch_steps = Path(directory), keep, frozenset(branch_steps)
        self.peers = Peers()
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._in_flight: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}

    def save(self, state: TrainState) -> None:
        """Copy `state` now and write it in the background.

        Waits for the write before it, so that at most one copy exists. Raises `ArtifactError` if that one failed.
        """
        self.wait()
        plain = copy.deepcopy({"step": state.step, "position": state.position, "extra": state.extra})
        self._in_flight = self._writer.submit(self._write, state.step, self._copied(_tensors(state)), plain)

    def wait(self) -> None:
        """Return when nothing is in flight. Raises `ArtifactError` when the write failed (disk full, no permission)."""
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def load_latest(self, state: TrainState) -> bool:
        """Restore the newest whole checkpoint into `state`; False when there is none, and `state` is as it was.

        A torn or damaged one is reported, removed and passed over; all ranks use the same one.
        """
        self.wait()
        if self.peers.is_main:
            for torn in self.directory.glob(".*.tmp"):
                shutil.rmtree(torn)
        for name in self.peers.first([folder.name for folder in reversed(self._folders())]):
            folder = self.directory / name
            problem = self._damage(folder)
            if problem is None:
                self._restore(folder, state)
                return True
            if self.peers.is_main:
                say(f"{folder}: {problem}; it is removed, and the checkpoint before it is used")
                shutil.rmtree(folder)
        return False

    def load(self, state: TrainState, step: int | None = None) -> None:
        """Restore the checkpoint after `step`, the last one where not given, into `state`.

        Raises `ArtifactError` when it is missing or damaged; nothing is removed, as another run owns the folder.
        """
        folders = {_step(folder): folder for folder in self._folders()}
        if (max(folders, default=None) if step is None else step) not in folders:
            held = f"it holds those after steps {', '.join(map(str, folders))}" if folders else "it holds none"
            raise ArtifactError(f"{self.directory}: no checkpoint after step {step}; {held}")
        folder = folders[max(folders) if step is None else step]
        if problem := self._damage(folder):
            raise ArtifactError(f"{folder}: {problem}; run the stage that wrote it again")
        self._restore(folder, state)

    def _folders(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))

    def _copied(self, found: Shards) -> Shards:
        """Tensors on the CPU, apart from those in training, in memory that is used again."""
        for name, shard in found.items():
            kept, now = self._copies.get(name), shard.local
            if kept is None or kept.shape != now.shape or kept.dtype != now.dtype:
                self._copies[name] = torch.empty(now.shape, dtype=now.dtype, pin_memory=now.is_cuda)
            self._copies[name].copy_(now, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: Shard(self._copies[name], shard.piece) for name, shard in found.items()}

    def _write(self, step: int, tensors: Shards, plain: dict[str, object]) -> None:
        final = self.directory / f"step-{step:08d}"
        temporary = self.directory / f".{final.name}.tmp"
        try:
            with artifact.explained(final):
                self._together(lambda: _emptied(temporary) if self.peers.is_main else None)
                shards.save(tensors, temporary, self.peers.group)
                written = self._together(lambda: _digests(temporary, self.peers.rank))
                self._together(lambda: self._finish(temporary, final, written, plain) if self.peers.is_main else None)
        finally:
            if self.peers.is_main:
                shutil.rmtree(temporary, ignore_errors=True)

    def _finish(self, temporary: Path, final: Path, written: list[dict[str, str]], plain: dict[str, object]) -> None:
        """Rank 0's part when all have written: what names a checkpoint whole, its place, and the end of old ones."""
        unseen = [
            (rank, name) for rank, names in enumerate(written) for name in names if not (temporary / name).exists()
        ]
        for rank, name in unseen:
            raise ArtifactError(
                f"{temporary}: rank 0 does not see {name}, which rank {rank} wrote; give all machines one shared folder"
            )
        artifact.write_json(temporary / _STATE, plain)
        checksums = {name: digest for names in written for name, digest in names.items()}
        checksums[_STATE] = artifact.file_digest(temporary / _STATE)
        artifact.write_json(temporary / _CHECKSUMS, checksums)
        if final.exists():
            shutil.rmtree(final)
        artifact.os.replace(temporary, final)
        for old in self._folders()[: -self.keep]:
            if _step(old) not in self.branch_steps:
                shutil.rmtree(old)

    def _together(self, act: Callable[[], T]) -> list[T]:
        """Every rank's result. When one was refused, all raise `ArtifactError` with the rank and the cause."""
        problem, result = None, None
        try:
            with artifact.explained(self.directory):
                result = act()
        except ArtifactError as error:
            problem = str(error)
        found = self.peers.gather((problem, result))
        for rank, (said, _) in enumerate(found):
            if said is not None:
                raise ArtifactError(f"rank {rank}: {said}" if self.peers.size > 1 else said)
        return [value for _, value in found]  # type: ignore[misc]

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, or `None`. Each rank reads its share of the files."""
        try:
            expected = artifact.read_json(folder / _CHECKSUMS)
        except ArtifactError:
            expected = None
        if not isinstance(expected, dict):
            found = f"incomplete, {_CHECKSUMS} is missing or damaged"
        else:
            found = _changed(folder, {name: expected[name] for name in [*expected][self.peers.rank :: self.peers.size]})
        return next((problem for problem in self.peers.gather(found) if problem), None)

    def _restore(self, folder: Path, state: TrainState) -> None:
        stored = shards.contents(folder)
        own = _tensors(state, moments=False)
        twice = [_MODEL + name for name, _ in state.model.named_parameters(remove_duplicate=False)]
        names = {name for rank in self.peers.gather([*own, *twice]) for name in rank}
        surplus = sorted(name for name in stored if name.startswith(_MODEL) and name not in names)
        problem = shards.misfit({name: shard for name, shard in own.items() if not name.startswith(_RANDOM)}, stored)
        problem = problem or (f"it also holds {surplus[0]}" if surplus else None)
        found = next((said for said in self.peers.gather(problem) if said), None)
        if found:
            raise ArtifactError(f"{folder}: does not fit this model: {found}; remove the stage's folder to start again")
        _make_moments(state, stored)
        tensors = dict(_tensors(state))
        stream = _stream(state)
        if stream not in stored:
            tensors[_RANDOM] = tensors.pop(stream)
        self._together(lambda: shards.load(tensors, folder))
        torch.set_rng_state(tensors.get(stream, tensors.get(_RANDOM)).local)  # type: ignore[union-attr]
        if stream not in stored:
            torch.manual_seed(int(torch.randint(2**62, ())) + _data_rank(state))
        plain = artifact.read_json(folder / _STATE)
        state.step, state.position, state.extra = plain["step"], plain["position"], plain["extra"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.peers.size > 1 and not isinstance(error, BloomeryError | KeyboardInterrupt):
            self._writer.shutdown(wait=False, cancel_futures=True)  # ranks that wait for one another's writers
            return  # would keep each other alive: this process is to end without it
        try:
            with suppress(*([BloomeryError, RuntimeError] if kind else [])):  # what ended the run is the news
                self.wait()
        finally:
            self._writer.shutdown()


def _held(state: TrainState) -> Iterator[tuple[str, nn.Parameter, Piece]]:
    """(name in the model of one process, parameter, the part of it that this rank holds)."""
    if state.parallel is None:
        for name, parameter in state.model.named_parameters():
            yield name, parameter, Piece.whole(parameter.shape)
    else:
        for name, parameter in state.parallel.data.parameters.items():
            yield name, parameter, state.parallel.placements[name].piece


def _tensors(state: TrainState, moments: bool = True) -> dict[str, Shard]:
    """Everything that is a tensor, under names that do not depend on how the model is spread over ranks."""
    found: dict[str, Shard] = {}
    for name, parameter, piece in _held(state):
        found[_MODEL + name] = Shard(_local(parameter), piece)
        for entry, value in state.optimizer.state.get(parameter, {}).items() if moments else ():
            part = piece if value.shape == parameter.shape else Piece.whole(value.shape)
            found[f"{_OPTIMIZER}{name}.{entry}"] = Shard(_local(value), part)
    stored = state.model.state_dict()  # without the buffers that are made anew each time
    found |= {_MODEL + name: Shard.whole(value) for name, value in state.model.named_buffers() if name in stored}
    return found | {_stream(state): Shard.whole(torch.get_rng_state())}


def _make_moments(state: TrainState, stored: dict[str, shards.TensorStorageMetadata]) -> None:
    """Room in the optimizer for every entry that a checkpoint has for this rank's parameters."""
    entries: dict[str, dict[str, shards.TensorStorageMetadata]] = {}
    for name, found in stored.items():
        if name.startswith(_OPTIMIZER):
            owner, _, entry = name.removeprefix(_OPTIMIZER).rpartition(".")
            entries.setdefault(owner, {})[entry] = found
    for name, parameter, piece in _held(state):
        for entry, found in entries.get(name, {}).items():
            kind = found.properties.dtype
            alike = tuple(found.size) == piece.shape
            room = torch.zeros_like(parameter, dtype=kind) if alike else torch.zeros(found.size, dtype=kind)
            state.optimizer.state[parameter][entry] = room.detach().to(parameter.device)


def _local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _data_rank(state: TrainState) -> int:
    return 0 if state.parallel is None else state.parallel.meshes.place("data")


def _stream(state: TrainState) -> str:
    """The name of this rank's random numbers. Ranks that share rows draw the same; one that a checkpoint does not know,
    as it comes from fewer data ranks, starts a stream of its own that follows from the first one's."""
    rank = _data_rank(state)
    return f"{_RANDOM}.{rank}" if rank else _RANDOM


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _emptied(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _digests(folder: Path, rank: int) -> dict[str, str]:
    """File name → digest of what a rank has written."""
    mine = [*folder.glob(f"__{rank}_*.distcp"), *([folder / ".metadata"] if rank == 0 else [])]
    return {file.name: artifact.file_digest(file) for file in sorted(mine)}


def _changed(folder: Path, expected: dict[str, str]) -> str | None:
    for name, digest in expected.items():
        if not (folder / name).is_file():
            return f"incomplete, {name} is missing"
        if artifact.file_digest(folder / name) != digest:
            return f"damaged, the content of {name} has changed"
    return None
