"""The processes of one run, as `torchrun` started them: who this one is, what all agree on, and the group of a stage.

Every rank runs the whole command. Between stages ranks speak through the launcher's key-value store alone, so that the
process which forks the stages holds no group and no thread; a stage's own process joins a process group and leaves it.
torch is loaded only where there is more than one process.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from bloomery.errors import ConfigError, PeerError

TIMEOUT_SECONDS = 600.0
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
_POLL_SECONDS, _CAUSE_SECONDS = 0.05, 5.0
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among `size`. `restart` counts how often the launcher has started them anew."""

    rank: int
    size: int
    local_rank: int
    restart: int

    @property
    def is_main(self) -> bool:
        """True for the rank that writes artifacts, metrics and progress."""
        return self.rank == 0


def world() -> World:
    """This process by the environment that torchrun sets; without one, the only process."""
    given = [os.environ.get(name) for name in _NAMES]
    rank, size, local, restart = (
        int(value) if value else default for value, default in zip(given, (0, 1, 0, 0), strict=True)
    )
    return World(rank, size, local, restart)


def leave() -> None:
    """Be the only process from here on: for a stage that rank 0 runs while the others wait."""
    for name in _NAMES:
        os.environ.pop(name, None)


def agreed(name: str, decide: Callable[[], str]) -> str:
    """What rank 0 decides, on every rank. The others wait for it, however long it takes: the launcher ends them when
    rank 0 fails. `name` is used once in a run. Raises `PeerError` when the launcher's store is gone."""
    here = world()
    if here.size == 1:
        return decide()
    if here.is_main:
        decision = decide()
        with explained():
            _store(os.getpid()).set(name, decision)
        return decision
    with explained():
        store = _store(os.getpid())
        while not store.check([name]):
            time.sleep(_POLL_SECONDS)
        found: bytes = store.get(name)
    return found.decode()


@contextmanager
def joined(name: str, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[World]:
    """Inside, torch's default process group holds all ranks: gloo for CPU tensors, NCCL for those on GPUs.

    name: the stage; used once in a run. A rank that does not answer for `timeout_seconds`, or that has died, raises
    `PeerError` on the others.
    """
    here = world()
    if here.size == 1:
        yield here
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    with explained():
        dist.init_process_group(
            backend, store=dist.PrefixStore(f"group/{name}", _store(os.getpid())), rank=here.rank,
            world_size=here.size, timeout=timedelta(seconds=timeout_seconds),
        )  # fmt: skip
        yield here
        dist.destroy_process_group()


@contextmanager
def explained() -> Iterator[None]:
    """Turns what torch raises when another rank has died, hangs or left into a `PeerError`."""
    try:
        yield
    except RuntimeError as error:
        silence = _silence(error)
        if silence is None:
            raise
        raise PeerError(
            f"another rank has died or does not answer ({silence}); what was saved is kept. "
            "Run the same command to continue, or give torchrun --max-restarts to have it done"
        ) from error


def _silence(error: BaseException | None) -> str | None:
    """What says so where an exception, or the one that torch wrapped in it, comes from another rank's silence; `None`
    where it is this one's own."""
    import torch.distributed as dist

    while error is not None:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            return str(error).splitlines()[0]
        error = error.__cause__
    return None


def any_rank(flag: bool) -> bool:
    """True on all ranks when `flag` is on any. Collective over the group that was joined; alone, the flag itself."""
    if world().size == 1:
        return flag
    import torch
    import torch.distributed as dist

    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


class Peers:
    """All ranks through a gloo group of their own, for plain objects: a thread may use it while training goes on.

    Made by all ranks at the same time, inside `joined`. In a single process nothing is sent and `group` is `None`.
    """

    def __init__(self) -> None:
        here = world()
        self.rank, self.size = here.rank, here.size
        self.group: Any = None
        if self.size > 1:
            import torch
            import torch.distributed as dist

            default = dist.distributed_c10d._get_default_group()
            timeout = default._get_backend(torch.device("cpu")).options._timeout
            self.group = dist.new_group(backend="gloo", timeout=timeout, group_desc="peers")

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return self.gather(value)[0]


def reports(message: str, consequence: bool) -> bool:
    """Whether this rank shall print its error: the first to fail does, for all.

    consequence: the error came from another rank's; that one is given some seconds to speak first. The launcher's own
    table of failures gets the message of every rank.
    """
    here = world()
    if here.size == 1:
        return True
    _tell_launcher(f"rank {here.rank}: {message}")
    if consequence:
        time.sleep(_CAUSE_SECONDS)
    try:
        return bool(_store(os.getpid()).add("reported", 1) == 1)
    except RuntimeError:  # the launcher is gone, and with it whoever else could have said it
        return True


def _tell_launcher(message: str) -> None:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and not os.path.exists(file):
        said = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with open(file, "w", encoding="utf-8") as target:
            json.dump({"message": said}, target)


@cache
def _store(process: int) -> Any:
    """This process's connection to the launcher's store; one opened before a fork is its parent's alone."""
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ConfigError(
            f"WORLD_SIZE is {world().size}, but torchrun did not start this process; start it with "
            "`torchrun --nproc-per-node N --no-python bloomery …`, or unset WORLD_SIZE"
        )
    server = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"bloomery/{world().restart}", server)
