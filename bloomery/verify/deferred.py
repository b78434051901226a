"""Work that a verifier leaves to a worker process, because it may hang or take much memory."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deferred:
    """`judge` names the function in `worker.JUDGES`, `arguments` its keyword arguments; `seconds` is the deadline of
    work that may honestly take longer than the pool's."""

    judge: str
    arguments: Mapping[str, str]
    seconds: float = 0.0
