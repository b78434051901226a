"""What a run tells the person watching: a live bar on a terminal, plain lines elsewhere, on the first rank only."""

import os
import sys
import time
from typing import Any

_PLAIN_SECONDS = 10.0


def say(message: str) -> None:
    """One line for the person watching."""
    if is_first_rank():
        print(message, file=sys.stderr, flush=True)  # noqa: T201


def is_first_rank() -> bool:
    """True in the only process, or in rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


class Bar:
    """Progress over `total` units. `with Bar("sft", 300) as bar: bar.update(step, "loss 1.23")`."""

    def __init__(self, title: str, total: int):
        self.title, self.total = title, total
        self._rich: Any = None  # rich is imported only where a person watches
        self._last = time.monotonic()

    def __enter__(self) -> "Bar":
        if is_first_rank() and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._rich = Progress(
                *columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True
            )
            self._rich.start()
            self._task = self._rich.add_task(self.title, total=self.total, note="")
        return self

    def update(self, done: int, note: str = "") -> None:
        """`done` units are finished; `note` is the latest headline number."""
        if self._rich is not None:
            self._rich.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._last >= _PLAIN_SECONDS or done == self.total:
            self._last = time.monotonic()
            say(f"{self.title}  {done}/{self.total}  {note}".rstrip())

    def __exit__(self, *_: object) -> None:
        if self._rich is not None:
            self._rich.stop()
