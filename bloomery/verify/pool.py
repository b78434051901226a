"""Many verdicts at once: cheap ones where they are asked for, the others in worker processes with hard deadlines."""

import atexit
import json
import os
import queue
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, cast

from bloomery.errors import BloomeryError, SandboxError
from bloomery.verify.deferred import Deferred
from bloomery.verify.verdict import Status, Verdict
from bloomery.verify.verifiers import lookup

Item = tuple[str, str, str]
"""(verifier, completion, answer)"""

COMMAND = (sys.executable, "-m", "bloomery.verify.worker")
_LOAD_SECONDS = 120.0
_ATTEMPTS = 2


def judge(verifier: str, completion: str, answer: str, require_think: bool = False) -> Verdict:
    """The verdict on one completion against a prompt's `answer`.

    `require_think` asks for `</think>` in the completion; without it, only a completion that opens `<think>` must close
    it. Raises `ConfigError` for an unknown verifier and `ArtifactError` for an answer that the verifier cannot use.
    """
    outcome = lookup(verifier)(completion, answer, require_think)
    return _shared_pool().defer(outcome).result() if isinstance(outcome, Deferred) else outcome


class Pool:
    """Judges completions. Use as `with Pool(workers=2) as pool:`.

    `submit` returns a `Future[Verdict]` at once, so that verification overlaps decoding; `judge_all` waits. No process
    starts before an item needs one. A worker that passes the deadline is killed and its item is a `timeout` (score 0);
    one that dies is replaced and its item retried once, then `infra_error` (score `None`). Where programs cannot be
    isolated, `SandboxError`. An exception inside a
    verifier is a bug: it is raised here, by `submit` or by the future, and never becomes a verdict.
    """

    def __init__(
        self,
        workers: int = 2,
        deadline_seconds: float = 10.0,
        require_think: bool = False,
        command: Sequence[str] = COMMAND,
    ):
        self._deadline, self._require_think, self._command = deadline_seconds, require_think, command
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="verify")
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._alive: set[Worker] = set()
        self._closed = False

    def submit(self, verifier: str, completion: str, answer: str) -> "Future[Verdict]":
        """The verdict, now or later. Raises `ConfigError` for an unknown verifier, `ArtifactError` for a bad answer."""
        outcome = lookup(verifier)(completion, answer, self._require_think)
        if isinstance(outcome, Deferred):
            return self.defer(outcome)
        done: Future[Verdict] = Future()
        done.set_result(outcome)
        return done

    def defer(self, task: Deferred) -> "Future[Verdict]":
        """Hand a verifier's unfinished work to a worker process."""
        return self._threads.submit(self._work, task)

    def judge_all(self, items: Iterable[Item]) -> list[Verdict]:
        """The verdicts in the order of the items."""
        return [future.result() for future in [self.submit(*item) for item in items]]

    def _work(self, task: Deferred) -> Verdict:
        """Runs in a thread that does nothing but wait for its process."""
        deadline = max(self._deadline, task.seconds)
        for _ in range(_ATTEMPTS):
            worker = self._take()
            try:
                reply = worker.judge(task, deadline)
            except TimeoutError:
                self._discard(worker)
                return Verdict.of("timeout", f"no verdict within {deadline:g} s; the worker was killed")
            except (EOFError, BrokenPipeError):
                self._discard(worker)
                continue
            self._idle.put(worker)
            if "refused" in reply:
                raise SandboxError(reply["refused"])
            if "bug" in reply:
                raise RuntimeError(f"verifier {task.judge!r} failed on {dict(task.arguments)!r:.500}\n{reply['bug']}")
            return Verdict.of(cast(Status, reply["status"]), reply["reason"])
        return Verdict.of("infra_error", f"the worker process died {_ATTEMPTS} times on this item")

    def _take(self) -> "Worker":
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            worker = self._start()
            self._alive.add(worker)
        if self._closed:  # closed while this one was starting
            worker.kill()
        return worker

    def _start(self) -> "Worker":
        return Worker(self._command)

    def _discard(self, worker: "Worker") -> None:
        self._alive.discard(worker)
        worker.bury()

    def close(self) -> None:
        """Drop what waits, kill every worker, leave no process behind."""
        self._closed = True
        for worker in list(self._alive):
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in list(self._alive):
            self._discard(worker)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@lru_cache(maxsize=1)
def _shared_pool() -> Pool:
    pool = Pool(workers=1)
    atexit.register(pool.close)
    return pool


class Worker:
    """One process that answers one request at a time. Used by one thread at a time, except for `kill`."""

    def __init__(self, command: Sequence[str]):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, bufsize=0, start_new_session=True,  # Ctrl-C is for the parent
        )  # fmt: skip
        self._command, self._loaded = command, set[str]()

    def judge(self, task: Deferred, seconds: float) -> dict[str, str]:
        """The reply to one item. Raises `TimeoutError` past the deadline, `EOFError` when the process dies."""
        if task.judge not in self._loaded:
            self._load(task.judge)
        return self.ask({"judge": task.judge, "arguments": dict(task.arguments), "seconds": seconds}, seconds)

    def _load(self, judge: str) -> None:
        """Imports take seconds on a busy machine; they do not count against an item's deadline."""
        try:
            reply = self.ask({"load": judge}, _LOAD_SECONDS)
        except TimeoutError:
            raise BloomeryError(f"verify: a worker could not load {judge!r} within {_LOAD_SECONDS:g} s") from None
        except (EOFError, BrokenPipeError):
            raise BloomeryError(
                f"verify: a worker process ended while loading {judge!r}{self._ending()}; "
                f"run {shlex.join(self._command)} by hand to see why"
            ) from None
        if "bug" in reply:
            raise BloomeryError(f"verify: a worker cannot load {judge!r}; check the installation\n{reply['bug']}")
        self._loaded.add(judge)

    def _ending(self) -> str:
        return f" (exit status {self._process.wait()})"

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, str]:
        """The reply to one request."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request).encode() + b"\n")
        deadline, reply = time.monotonic() + seconds, b""
        while not reply.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = stdout.read(65536)
            if not chunk:
                raise EOFError
            reply += chunk
        return json.loads(reply)

    def kill(self) -> None:
        """Ends the process; whoever waits for it sees the end of its output."""
        self._process.kill()

    def bury(self) -> None:
        """Ends the process, waits for it and closes its pipes."""
        self._process.kill()
        with self._process:
            pass
