"""Filters: documents in, documents out; whatever is left out is counted with its reason."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from pydantic import model_validator

from bloomery.config import Config, Field
from bloomery.data.document import Document, Drops, content_hash
from bloomery.data.measures import Measures, repeated

# Control characters but tab, newline, return and form feed; half surrogate pairs; what a bad decoder leaves behind.
_INVALID = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff\ufffd\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # Gopher's rules, with the line rules of C4 and FineWeb that do not depend on a crawl.
    "web": {
        "min_words": 50, "max_words": 100_000, "min_mean_word_length": 3, "max_mean_word_length": 10,
        "max_symbol_ratio": 0.1, "max_bullet_lines": 0.9, "max_ellipsis_lines": 0.3, "min_alphabetic_words": 0.8,
        "min_stop_words": 2, "min_punctuated_lines": 0.12, "max_short_lines": 0.67,
        "max_repeated_lines": 0.3, "max_repeated_line_characters": 0.2,
        "max_repeated_paragraphs": 0.3, "max_repeated_paragraph_characters": 0.2,
        "max_top_ngram": {2: 0.2, 3: 0.18, 4: 0.16},
        "max_repeated_ngrams": {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1},
        "phrases": ["lorem ipsum"],
    },
    # Codex' limits for files of programs. Programs repeat lines and have no function words, so no rule of prose holds.
    "code": {
        "min_characters": 20, "max_characters": 1_000_000, "max_mean_line_length": 100, "max_line_length": 1000,
        "min_alphanumeric": 0.25, "max_repeated_line_characters": 0.7, "generated": False,
    },
    # Our own: formulas are short words without letters, and derivations repeat phrases; only loops and lists go.
    "math": {
        "min_words": 10, "max_words": 100_000, "min_mean_word_length": 1.5, "max_mean_word_length": 20,
        "min_alphabetic_words": 0.3, "max_ellipsis_lines": 0.3, "max_repeated_lines": 0.4,
        "max_top_ngram": {3: 0.4, 4: 0.4}, "max_repeated_ngrams": {8: 0.4, 10: 0.35},
        "phrases": ["lorem ipsum"],
    },
}  # fmt: skip
"""Limits by kind of text."""


def _share(description: str) -> Any:
    return Field(default=None, description=description, ge=0, le=1)


class FilterConfig(Config):
    """Which documents are left out. A limit that is null is not applied."""

    preset: Literal["none", "web", "code", "math"] = Field(
        default="none", description="limits for a kind of text, for every limit not given here; null switches one off"
    )
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
    languages: list[str] | None = Field(
        default=None, description="languages kept, as ISO 639-1 codes; und is a text whose language cannot be told"
    )
    phrases: list[str] = Field(default=[], description="a text with one of these is dropped; case does not count")
    generated: bool = Field(default=True, description="keep files whose first lines say that a program wrote them")
    min_words: int | None = Field(default=None, description="fewest words of a text", ge=0)
    max_words: int | None = Field(default=None, description="most words of a text", gt=0)
    min_mean_word_length: float | None = Field(default=None, description="shortest mean word, in characters", ge=0)
    max_mean_word_length: float | None = Field(default=None, description="longest mean word, in characters", gt=0)
    max_mean_line_length: float | None = Field(default=None, description="longest mean line, in characters", gt=0)
    max_line_length: int | None = Field(default=None, description="longest line, in characters", gt=0)
    max_symbol_ratio: float | None = Field(default=None, description="most # or … a word", ge=0)
    min_alphanumeric: float | None = _share("least share of characters that are letters or digits")
    min_alphabetic_words: float | None = _share("least share of words with a letter")
    min_stop_words: int | None = Field(
        default=None, description="fewest different ones of eight English function words (the, be, to, of, …)", ge=0
    )
    max_bullet_lines: float | None = _share("largest share of lines that start with a bullet")
    max_ellipsis_lines: float | None = _share("largest share of lines that end with …")
    min_punctuated_lines: float | None = _share("least share of lines that end with a punctuation mark")
    max_short_lines: float | None = _share("largest share of lines of at most 30 characters")
    max_repeated_lines: float | None = _share("largest share of non-empty lines that repeat an earlier one")
    max_repeated_line_characters: float | None = _share("largest share of characters in such lines")
    max_repeated_paragraphs: float | None = _share("largest share of paragraphs that repeat an earlier one")
    max_repeated_paragraph_characters: float | None = _share("largest share of characters in such paragraphs")
    max_top_ngram: dict[int, float] | None = Field(
        default=None, description="words in a row → largest share of characters in the most frequent such run"
    )
    max_repeated_ngrams: dict[int, float] | None = Field(
        default=None, description="words in a row → largest share of characters in such runs that came before"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, data: Any) -> Any:
        preset = PRESETS.get(data.get("preset", "none")) if isinstance(data, dict) else None
        return {**preset, **data} if preset else data


_RULES: tuple[tuple[str, str, Callable[[Measures], float]], ...] = (
    ("min_characters", "shorter than {} characters", lambda text: text.characters),
    ("max_characters", "longer than {} characters", lambda text: text.characters),
    ("min_words", "fewer than {} words", lambda text: text.num_words),
    ("max_words", "more than {} words", lambda text: text.num_words),
    ("min_mean_word_length", "short words", lambda text: text.mean_word_length),
    ("max_mean_word_length", "long words", lambda text: text.mean_word_length),
    ("max_line_length", "line longer than {} characters", lambda text: text.line_length),
    ("max_mean_line_length", "long lines", lambda text: text.mean_line_length),
    ("max_symbol_ratio", "symbols", lambda text: text.symbol_ratio),
    ("min_alphanumeric", "few letters and digits", lambda text: text.alphanumeric),
    ("min_alphabetic_words", "words without letters", lambda text: text.alphabetic_words),
    ("min_stop_words", "few function words", lambda text: text.stop_words),
    ("max_bullet_lines", "bullet lines", lambda text: text.bullet_lines),
    ("max_ellipsis_lines", "ellipsis lines", lambda text: text.ellipsis_lines),
    ("min_punctuated_lines", "lines without punctuation", lambda text: text.punctuated_lines),
    ("max_short_lines", "short lines", lambda text: text.short_lines),
    ("max_repeated_lines", "repeated lines", lambda text: text.repeated_lines),
    ("max_repeated_line_characters", "characters in repeated lines", lambda text: text.repeated_line_characters),
    ("max_repeated_paragraphs", "repeated paragraphs", lambda text: text.repeated_paragraphs),
    (
        "max_repeated_paragraph_characters",
        "characters in repeated paragraphs",
        lambda text: text.repeated_paragraph_characters,
    ),
)
"""Limit, reason and what is compared with the limit; cheap ones first."""


def filter_documents(documents: Iterable[Document], config: FilterConfig, drops: Drops) -> Iterator[Document]:
    """The documents that pass; the others are counted in `drops`."""
    for document in documents:
        reason = drop_reason(document.text, config)
        if reason is None:
            yield document
        else:
            drops.add(reason, document.id)


def drop_reason(text: str, config: FilterConfig) -> str | None:
    """Why a text is left out, by the first rule that it breaks; `None` when it is kept."""
    measures = Measures(text)
    if not measures.characters:
        return "empty"
    return (
        _first_broken(measures, config, _RULES[:2])
        or _unreadable(text, config)
        or _unwanted(measures, config)
        or _first_broken(measures, config, _RULES[2:])
        or _repetitive(measures, config)
    )


def _first_broken(measures: Measures, config: FilterConfig, rules: Iterable[Any]) -> str | None:
    for name, reason, measure in rules:
        limit = getattr(config, name)
        if limit is None:
            continue
        value = measure(measures)
        if value < limit if name.startswith("min_") else value > limit:
            return reason.format(limit)
    return None


def _unreadable(text: str, config: FilterConfig) -> str | None:
    if _SURROGATE.search(text) or len(_INVALID.findall(text)) > config.max_invalid_fraction * len(text):
        return "invalid characters"
    return None


def _unwanted(measures: Measures, config: FilterConfig) -> str | None:
    if config.phrases:
        lower = measures.text.lower()
        if found := [phrase for phrase in config.phrases if phrase.lower() in lower]:
            return f"phrase {found[0]!r}"
    if not config.generated and measures.is_generated:
        return "generated file"
    if config.languages is not None and measures.language not in config.languages:
        return f"language {measures.language}"
    return None


def _repetitive(measures: Measures, config: FilterConfig) -> str | None:
    for length, limit in (config.max_top_ngram or {}).items():
        if measures.top_ngram(length) > limit:
            return f"one run of {length} words over and over"
    for length, limit in (config.max_repeated_ngrams or {}).items():
        if measures.repeated_ngrams(length) > limit:
            return f"repeated runs of {length} words"
    return None


def repeated_lines(text: str) -> float:
    """Share of the non-empty lines that repeat an earlier one."""
    return repeated(Measures(text).lines)[0]


def sample_documents(documents: Iterable[Document], fraction: float) -> Iterator[Document]:
    """A random `fraction`, chosen by a hash of the text: no prefix of a file, and the same choice in every run."""
    return (document for document in documents if int(content_hash(document.text)[-8:], 16) < fraction * 2**32)
