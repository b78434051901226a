"""Verdicts by the workers of a Ray cluster (extra `ray`): the same worker processes, on many machines.

An actor stands on some node and hands requests to a worker process there, so that deadlines, retries, refusals and bugs
are those of `Pool`. Every node needs bloomery, and bubblewrap where programs are judged.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from bloomery.errors import ConfigError
from bloomery.verify.pool import COMMAND, Pool, Worker

Where = Literal["local", "ray"]
_GRACE_SECONDS = 30.0
"""How much longer than its worker an actor may take: for the way through the cluster, and for its start."""


def open_pool(where: Where, workers: int, require_think: bool = False) -> Pool:
    """A pool of `workers` processes on this machine, or spread over the nodes of a Ray cluster.

    The cluster is that of `RAY_ADDRESS`, else the one of this machine, which is started where there is none. Raises
    `ConfigError` without Ray.
    """
    if where == "local":
        return Pool(workers, require_think=require_think)
    return RayPool(workers, require_think=require_think)


class RayPool(Pool):
    """`Pool` whose workers are actors, one processor each, spread over the cluster."""

    def __init__(self, workers: int = 2, deadline_seconds: float = 10.0, require_think: bool = False):
        super().__init__(workers, deadline_seconds, require_think)
        self._ray = _connected()

    def _start(self) -> Worker:
        return _RemoteWorker(self._ray)


class Post:
    """What an actor is: the worker process of its node."""

    def __init__(self) -> None:
        self._worker = Worker(COMMAND)

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, str]:
        """The reply of the process. One that is late or dead is ended first, so that nothing outlives the actor."""
        try:
            return self._worker.ask(request, seconds)
        except (TimeoutError, EOFError, BrokenPipeError):
            self._worker.bury()
            raise


class _RemoteWorker(Worker):
    """A worker process on some node, behind its actor."""

    def __init__(self, ray: Any):
        self._ray, self._command, self._loaded = ray, COMMAND, set[str]()
        options: Callable[..., Any] = ray.remote(Post).options
        self._actor = options(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD").remote()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, str]:
        waiting = self._actor.ask.remote(request, seconds)
        with suppress(self._ray.exceptions.RayActorError):  # its node is lost, or it was killed
            return self._ray.get(waiting, timeout=seconds + _GRACE_SECONDS)
        raise EOFError

    def _ending(self) -> str:
        return " on its node"

    def kill(self) -> None:
        self._ray.kill(self._actor)

    def bury(self) -> None:
        self._ray.kill(self._actor)


def _connected() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("verdicts by Ray: it is not installed; run pip install 'bloomery[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, configure_logging=False)
    return ray
