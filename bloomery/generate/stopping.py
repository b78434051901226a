"""Finding stop strings in a text that grows token by token, at constant cost a token."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_MARGIN = 4  # characters at the start of a window that a cut inside a multi-byte character may have spoiled


class StopStrings:
    """Watches one generated text. Only a window of recent tokens is decoded, never the whole text again."""

    def __init__(self, stop: Sequence[str], decode: Decode):
        self._stop, self._decode = tuple(stop), decode
        self._needed = max(map(len, stop)) + _MARGIN
        self._window: list[int] = []
        self.found = False

    def push(self, token: int) -> bool:
        """Add the next token; true when the text now contains a stop string."""
        self._window.append(token)
        text = self._decode(self._window)
        self.found = any(stop in text for stop in self._stop)
        if len(self._window) >= 2 * self._needed:
            self._shorten()
        return self.found

    def _shorten(self) -> None:
        """Forget the older half, unless its tokens carry so little text that a stop string could begin there."""
        recent = self._window[len(self._window) // 2 :]
        if len(self._decode(recent)) >= self._needed:
            self._window = recent


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first stop string in it."""
    found = [position for position in (text.find(s) for s in stop) if position >= 0]
    return text[: min(found)] if found else text
