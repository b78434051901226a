"""Requests that wait for a row, first come first served."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from bloomery.generate.request import Prompt, Waiting


class Queue:
    """In order of arrival; anyone can leave. Knows which prompts wait."""

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}
        self._prompts: Counter[Prompt] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, prompt: Prompt) -> bool:
        return self._prompts[prompt] > 0

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    def append(self, waiting: Waiting) -> None:
        """At the end."""
        self._waiting[waiting.ticket] = waiting
        self._prompts[waiting.prompt] += 1

    def return_first(self, waiting: Iterable[Waiting]) -> None:
        """Back at the beginning, in this order."""
        back = {one.ticket: one for one in waiting}
        self._prompts.update(one.prompt for one in back.values())
        self._waiting = back | self._waiting

    def remove(self, ticket: int) -> bool:
        """Whether it waited here."""
        gone = self._waiting.pop(ticket, None)
        if gone is None:
            return False
        self._prompts[gone.prompt] -= 1
        if not self._prompts[gone.prompt]:
            del self._prompts[gone.prompt]
        return True

    def first(self, count: int) -> list[Waiting]:
        """The next `count`, which stay."""
        return list(islice(self._waiting.values(), count))
