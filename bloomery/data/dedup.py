"""Removal of repeated documents."""

import unicodedata
from collections.abc import Iterable, Iterator

from bloomery.data.document import Document, Drops, content_hash


class ExactDedup:
    """Lets each text through once. One object serves many sources: a text in two of them counts for the first.

    Texts are equal when they differ only in white space and Unicode composition; case counts, as in `x` and `X`.
    Memory: 16 bytes and a set entry for each text kept.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, documents: Iterable[Document], drops: Drops) -> Iterator[Document]:
        """The documents not seen before; the others are counted in `drops`."""
        for document in documents:
            identity = bytes.fromhex(content_hash(normalized(document.text)))
            if identity in self._seen:
                drops.add("duplicate", document.id)
            else:
                self._seen.add(identity)
                yield document


def normalized(text: str) -> str:
    """The text with composed characters and single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())
