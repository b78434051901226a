"""The noun of this package: a piece of text, where it comes from, and the reasons why others were left out."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_EXAMPLES_PER_REASON = 3


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its origin.

    `id` is the content hash where none is given. `columns` holds what a dataset kind adds to text, such as
    `messages` or `prompt`, `answer` and `verifier`; `text` is then their readable form, which filters look at.
    """

    text: str
    id: str = ""
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", content_hash(self.text))

    def row(self, kind: str) -> dict[str, Any]:
        """The row of a dataset folder of this kind."""
        own = {"text": self.text} if kind == "documents" else dict(self.columns)
        metadata = json.dumps(dict(self.metadata), ensure_ascii=False, sort_keys=True)
        return {**own, "id": self.id, "source": self.source, "metadata": metadata}


def content_hash(text: str) -> str:
    """blake2b-128 of the text, in hex. Half a surrogate pair is hashed too, so that no text lacks an id."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Drops:
    """Counts what was left out, by reason, and remembers the first few of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, example: str = "") -> None:
        """One more left out for `reason`; `example` says which."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if example and len(examples) < _EXAMPLES_PER_REASON:
            examples.append(example)

    @property
    def total(self) -> int:
        """How many were left out."""
        return self.counts.total()

    def __str__(self) -> str:
        """`12 too short (a, b, c), 3 duplicate (d)`, the commonest reason first."""
        parts = []
        for reason, count in self.counts.most_common():
            examples = ", ".join(self.examples[reason])
            parts.append(
                f"{count} {reason}"
                + (f" ({examples}{', …' if count > len(self.examples[reason]) else ''})" if examples else "")
            )
        return ", ".join(parts) or "none"
