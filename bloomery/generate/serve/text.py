"""Text for a stream: whole characters only, and never the beginning of a stop string."""

from collections.abc import Sequence

from bloomery.generate.stopping import Decode

_CUT = "\ufffd"  # what a decoder shows for the bytes of a character that is not complete yet
_KEPT, _LONGEST = 8, 32  # tokens: a character has at most four, so eight say how the next one reads


class TextStream:
    """Turns tokens into pieces of text that will not change any more; the pieces add up to the whole text.

    Only a window of recent tokens is decoded, so the cost of a token does not grow with the text.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()):
        self._decode, self._stop = decode, tuple(stop)
        self._window: list[int] = []
        self._read = 0  # characters of the window's text that have been taken
        self._held = ""
        self._sent = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain; often empty."""
        self._window += tokens
        certain = self._certain()
        self._held += certain[self._read :]
        self._read = len(certain)
        if len(self._window) > _LONGEST:
            self._window = self._window[-_KEPT:]
            self._read = len(self._certain())
        piece = self._held[: len(self._held) - self._doubtful()]
        self._held = self._held[len(piece) :]
        self._sent += len(piece)
        return piece

    def finish(self, text: str) -> str:
        """What is left of the whole `text`, which the engine has cut at the stop string."""
        return text[self._sent :]

    def _certain(self) -> str:
        return self._decode(self._window).removesuffix(_CUT)

    def _doubtful(self) -> int:
        """Length of the longest end of what is held that may begin, or already be, a stop string."""
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            return len(self._held) - min(found)
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        ends = (length for length in range(longest, 0, -1) if self._begins_stop(self._held[-length:]))
        return next(ends, 0)

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
