"""Filters: documents in, documents out; whatever is left out is counted with its reason."""

import re
from collections.abc import Iterable, Iterator

from bloomery.config import Config, Field
from bloomery.data.document import Document, Drops, content_hash

# Control characters but tab, newline, return and form feed; half surrogate pairs; what a bad decoder leaves behind.
_INVALID = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff\ufffd\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class FilterConfig(Config):
    """Which documents are left out."""

    min_characters: int = Field(
        default=1, description="shortest text kept, in characters without surrounding space", ge=1
    )
    max_characters: int | None = Field(default=None, description="longest text kept, in characters", gt=0)
    max_invalid_fraction: float = Field(
        default=0.001,
        description="share of control and replacement characters above which a text is broken",
        ge=0,
        le=1,
    )
    max_repeated_lines: float | None = Field(
        default=None,
        description="share of non-empty lines that repeat an earlier one, above which a text is dropped",
        ge=0,
        le=1,
    )


def filter_documents(documents: Iterable[Document], config: FilterConfig, drops: Drops) -> Iterator[Document]:
    """The documents that pass; the others are counted in `drops`."""
    for document in documents:
        reason = drop_reason(document.text, config)
        if reason is None:
            yield document
        else:
            drops.add(reason, document.id)


def drop_reason(text: str, config: FilterConfig) -> str | None:
    """Why a text is left out; `None` when it is kept."""
    characters = len(text.strip())
    if not characters:
        return "empty"
    if characters < config.min_characters:
        return f"shorter than {config.min_characters} characters"
    if config.max_characters is not None and characters > config.max_characters:
        return f"longer than {config.max_characters} characters"
    if _SURROGATE.search(text) or len(_INVALID.findall(text)) > config.max_invalid_fraction * len(text):
        return "invalid characters"
    if config.max_repeated_lines is not None and repeated_lines(text) > config.max_repeated_lines:
        return "repeated lines"
    return None


def repeated_lines(text: str) -> float:
    """Share of the non-empty lines that repeat an earlier one (Rae et al. 2021, arXiv 2112.11446, table A1)."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def sample_documents(documents: Iterable[Document], fraction: float) -> Iterator[Document]:
    """A random `fraction`, chosen by a hash of the text: no prefix of a file, and the same choice in every run."""
    return (document for document in documents if int(content_hash(document.text)[-8:], 16) < fraction * 2**32)
