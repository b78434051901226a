"""Functions run in several processes of one gloo group, which is started once per size and used again.

`distributed.run(2, function, argument)` calls `function(argument)` in every process and returns the results by rank.
The function must be importable: a module-level function of a test file.
"""

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 120.0


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results by rank. Raises `RuntimeError` with the traceback of the first rank that failed, and ends the group."""
    connections = _group(world)
    for connection in connections:
        connection.send((function, arguments))
    answers = [_receive(connection) for connection in connections]
    failures = [f"rank {rank}:\n{answer}" for rank, (good, answer) in enumerate(answers) if not good]
    if failures:
        _group.cache_clear()  # other ranks may wait inside a collective for good
        raise RuntimeError(failures[0])
    return [answer for _, answer in answers]


def _receive(connection: Connection) -> tuple[bool, Any]:
    if not connection.poll(TIMEOUT_SECONDS):
        return False, f"no answer within {TIMEOUT_SECONDS:g} s"
    try:
        return connection.recv()
    except EOFError:
        return False, "the process died"


@cache
def _group(world: int) -> list[Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed"])
    meeting = os.path.join(tempfile.mkdtemp(prefix="gloo-"), "meeting")
    connections = []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, rank, world, meeting), daemon=True)
        process.start()
        atexit.register(process.kill)
        theirs.close()
        connections.append(ours)
    return connections


def _serve(connection: Connection, rank: int, world: int, meeting: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*arguments)))
        except Exception:  # noqa: BLE001 - whatever a test raises travels to the parent
            connection.send((False, traceback.format_exc()))
