"""Work that a verifier leaves to a worker process, because it may hang or take much memory."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deferred:
    """`judge` names the function in `worker.JUDGES`; `arguments` are its keyword arguments."""

    judge: str
    arguments: Mapping[str, str]
