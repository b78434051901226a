"""What a remote batch has already paid for: one JSON line an answer, so that a rerun asks only for what is missing."""

import fcntl
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bloomery import artifact
from bloomery.errors import ArtifactError
from bloomery.generate.request import Completion, Request


def digest(model: str, request: Request) -> str:
    """Identity of a request to a model: equal ones get equal answers, so one is enough."""
    parts = [model, list(request.prompt_ids), request.params.model_dump(mode="json")]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class Journal:
    """Answers by request digest, in a file where `path` is given. Use as a context; one writer at a time."""

    def __init__(self, path: Path | None):
        self._path = path
        self._answers: dict[str, Completion] = {}

    def __enter__(self) -> Self:
        if self._path is not None:
            with artifact.explained(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a+b")
            self._lock(self._path)
            self._read(self._path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None:
            self._file.close()

    def get(self, key: str) -> Completion | None:
        """The answer kept for this request."""
        return self._answers.get(key)

    def put(self, key: str, completion: Completion) -> None:
        """Keep an answer: on disk before it is handed on."""
        self._answers[key] = completion
        if self._path is not None:
            line = json.dumps({"request": key, "completion": asdict(completion)})
            with artifact.explained(self._path):
                self._file.write(line.encode() + b"\n")
                self._file.flush()

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ArtifactError(
                f"{path}: another process is writing here; wait for it or choose another file"
            ) from None

    def _read(self, path: Path) -> None:
        """Everything but a torn last line, which is cut off."""
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                self._answers[row["request"]] = _completion(row["completion"])
            except (ValueError, KeyError, TypeError):
                self._file.close()
                raise ArtifactError(
                    f"{path}: line {number} is not an answer; remove it or choose another file"
                ) from None
            good += len(line)
        self._file.truncate(good)


@dataclass
class Ledger:
    """What a client has asked for and got, since it was made. Prices are per million tokens, in any currency."""

    prompt_price: float | None = None
    completion_price: float | None = None
    requests: int = 0
    from_journal: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, usage: Mapping[str, Any], retries: int) -> None:
        """One more paid answer."""
        details = usage.get("prompt_tokens_details") or {}
        self.requests += 1
        self.retries += retries
        self.prompt_tokens += usage.get("prompt_tokens") or 0
        self.cached_prompt_tokens += details.get("cached_tokens") or 0
        self.completion_tokens += usage.get("completion_tokens") or 0

    @property
    def cost(self) -> float | None:
        """Price of all tokens; `None` where no price is known."""
        if self.prompt_price is None or self.completion_price is None:
            return None
        return (self.prompt_tokens * self.prompt_price + self.completion_tokens * self.completion_price) / 1e6


def _completion(row: dict[str, Any]) -> Completion:
    """Back from JSON, where token ids that are keys have become text."""
    for name in ("top_logprobs", "prompt_top_logprobs"):
        if row.get(name) is not None:
            row[name] = [None if top is None else {int(t): p for t, p in top.items()} for top in row[name]]
    return Completion(**row)
