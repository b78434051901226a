"""The one thread that owns the engine: requests come in from the event loop, updates go back to it."""

import asyncio
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from queue import SimpleQueue

from bloomery.errors import ConfigError
from bloomery.generate.engine import Engine
from bloomery.generate.request import Request, Update
from bloomery.generate.serve.errors import ApiError, invalid
from bloomery.progress import say

_RETRY_SECONDS = 1


class Job:
    """One request inside the engine, and the call that it belongs to."""

    def __init__(self, call: "Call", index: int, request: Request):
        self.call, self.index, self.request = call, index, request
        self.ticket: int | None = None  # the engine thread's; None before and after
        self.open = True  # the event loop's: something may still come


class Call:
    """The requests of one HTTP call. Iterate for (index, update) until every one has its completion."""

    def __init__(self, requests: Sequence[Request], timeout_seconds: float):
        self.jobs = [Job(self, index, request) for index, request in enumerate(requests)]
        self.mailbox: asyncio.Queue[tuple[int, Update] | ApiError] = asyncio.Queue()
        self._timeout = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        left = len(self.jobs)
        while left:
            index, update = await self._next()
            left -= update.completion is not None
            yield index, update

    async def _next(self) -> tuple[int, Update]:
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                found = await self.mailbox.get()
        except TimeoutError:
            raise ApiError(
                504, f"not finished within {self._timeout:g} seconds; ask for fewer tokens, or when less is going on",
                code="timeout",
            ) from None  # fmt: skip
        if isinstance(found, ApiError):
            raise found
        return found


class Worker:
    """Runs the engine in a thread of its own. All methods belong to the event loop.

    `capacity` bounds the requests inside, running and waiting; what the engine raises ends them all, and the worker.
    """

    def __init__(self, engine: Engine, capacity: int):
        self.engine, self.capacity = engine, capacity
        self.failure: str | None = None
        self.stats = engine.stats  # as of the last step
        self._open: set[Job] = set()
        self._jobs: dict[int, Job] = {}  # by ticket, the engine thread's
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin; call inside the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def open(self) -> int:
        """Requests that have no completion yet."""
        return len(self._open)

    def submit(self, requests: Sequence[Request], timeout_seconds: float) -> Call:
        """Queue all requests of a call, or refuse all: 503 without an engine, 429 when the queue is full."""
        if self.failure:
            raise self._dead()
        if len(requests) > self.capacity:
            raise invalid(
                f"the call asks for {len(requests)} completions, this server holds {self.capacity} at once; send fewer "
                "prompts, or a smaller n", code="too_many_completions",
            )  # fmt: skip
        if self.open + len(requests) > self.capacity:
            raise ApiError(
                429, f"{self.open} requests are inside and {self.capacity} is the limit; try again later",
                code="queue_full", retry_after=_RETRY_SECONDS,
            )  # fmt: skip
        call = Call(requests, timeout_seconds)
        for job in call.jobs:
            self._open.add(job)
            self._inbox.put(lambda job=job: self._admit(job))  # type: ignore[misc]
        return call

    def cancel(self, call: Call) -> None:
        """Nobody waits any more: free the rows. Finished ones are left alone."""
        for job in call.jobs:
            if job.open:
                self._close(job)
                self._inbox.put(lambda job=job: self._drop(job))  # type: ignore[misc]

    def refuse_all(self, error: ApiError) -> None:
        """End every open call with this error."""
        for call in {job.call for job in self._open}:
            self.cancel(call)
            call.mailbox.put_nowait(error)

    def _close(self, job: Job) -> None:
        job.open = False
        self._open.discard(job)

    def _dead(self) -> ApiError:
        return ApiError(503, f"the engine has stopped ({self.failure}); restart the server", code="engine_stopped")

    # What follows runs in the engine's thread, except the two that are handed to the loop.

    def _run(self) -> None:
        try:
            while self._take_orders():
                updates = [(self._job_of(update), update) for update in self.engine.step()]
                self.stats = self.engine.stats
                if updates:
                    self._loop.call_soon_threadsafe(self._deliver, updates)
        except Exception as error:  # noqa: BLE001 - whatever it is, all who wait must hear of it
            say(f"serve: the engine has stopped\n{traceback.format_exc()}")
            self._loop.call_soon_threadsafe(self._fail, type(error).__name__)

    def _take_orders(self) -> bool:
        """Do what the loop has asked for, waiting for it where there is nothing to compute; false: stop."""
        while not (self._inbox.empty() and self.engine.busy):
            order = self._inbox.get()
            if order is None:
                return False
            order()
            self.stats = self.engine.stats
        return True

    def _admit(self, job: Job) -> None:
        try:
            job.ticket = self.engine.add(job.request)
        except ConfigError as error:
            self._loop.call_soon_threadsafe(self._refuse, job, str(error))
        else:
            self._jobs[job.ticket] = job

    def _drop(self, job: Job) -> None:
        if job.ticket is not None:
            self.engine.cancel(job.ticket)
            self._jobs.pop(job.ticket, None)

    def _job_of(self, update: Update) -> Job | None:
        return self._jobs.pop(update.ticket, None) if update.completion else self._jobs.get(update.ticket)

    def _deliver(self, updates: list[tuple[Job | None, Update]]) -> None:
        for job, update in updates:
            if job is not None and job.open:
                job.call.mailbox.put_nowait((job.index, update))
                if update.completion:
                    self._close(job)

    def _refuse(self, job: Job, message: str) -> None:
        self.cancel(job.call)
        job.call.mailbox.put_nowait(invalid(message))

    def _fail(self, failure: str) -> None:
        self.failure = failure
        self.refuse_all(ApiError(500, f"the engine failed on this request ({failure})", code="engine_failed"))
