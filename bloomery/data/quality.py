"""Quality tiers: a small classifier that learns good from bad examples, and thresholds that stay fixed once measured.

Logistic regression over hashed words and pairs of words, as the classifiers that pick web text for pretraining (Brown
et al. 2020, appendix A; Li et al. 2024, arXiv 2406.11794, use fastText). It is trained in seconds and reads 2 MB/s.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from bloomery import artifact
from bloomery.config import Config, Field, RawPath
from bloomery.data.dataset import check_source_name
from bloomery.data.document import content_hash
from bloomery.data.read import Invalid, read_jsonl
from bloomery.data.sources import AnySource
from bloomery.data.words import tokens, window_hashes, word_hashes
from bloomery.errors import ArtifactError, ConfigError

FOLDER = "quality"
"""Folder in the stage's output: the classifier, its thresholds and how good it is."""

_WEIGHTS, _FACTS = "weights.npz", "quality.json"
_BITS = 18
_SHIFT = np.uint64(64 - _BITS)
_CHARACTERS = 20_000
_FEWEST_EXAMPLES = 20
_REGULARISATION = 10.0
_BINS = 10
_LABELS = {1: 1, 0: 0, "1": 1, "0": 0, "high": 1, "low": 0}
_DEFAULT_TIERS = {"high": 0.2, "medium": 0.3, "low": 0.5}


class QualityConfig(Config):
    """Sort documents into quality tiers; each becomes a source of its own, `web-high`, `web-medium` …"""

    trained: RawPath | None = Field(
        default=None, description="folder `quality` of an earlier prepare: its classifier and its thresholds, unchanged"
    )
    high: list[AnySource] = Field(default=[], description="sources of good examples")
    low: list[AnySource] = Field(default=[], description="sources of bad examples")
    labelled: RawPath | None = Field(
        default=None, description="JSONL with `text` and `label` (1 or high, 0 or low): further examples"
    )
    tiers: dict[str, float] | None = Field(
        default=None, description="tier → share of the documents, best first; high 0.2, medium 0.3, low 0.5 by default"
    )
    sources: list[str] | None = Field(default=None, description="sources that are sorted; all where not given")
    max_examples: int = Field(default=20_000, description="most examples read of each source of examples", gt=0)
    held_out: float = Field(default=0.2, description="share of the examples that measure, not teach", gt=0, lt=1)
    calibration_documents: int = Field(
        default=10_000, description="documents, from all over the sources, whose scores set the thresholds", gt=0
    )

    @property
    def shares(self) -> dict[str, float]:
        """Tier → share of the documents, best first."""
        return dict(_DEFAULT_TIERS if self.tiers is None else self.tiers)


def check(config: QualityConfig, sources: list[str]) -> None:
    """Raises `ConfigError` for settings that cannot be used with these sources."""
    if config.trained is not None:
        for name in ("high", "low", "labelled", "tiers"):
            if getattr(config, name):
                raise ConfigError(f"quality.{name}: has no effect beside quality.trained; remove one of the two")
    elif config.labelled is None and not (config.high and config.low):
        raise ConfigError("quality: no examples; give high and low sources, or labelled, or trained")
    if len(config.shares) < 2 or abs(sum(config.shares.values()) - 1) > 1e-6 or min(config.shares.values()) <= 0:
        raise ConfigError(f"quality.tiers: found {config.shares}, expected two or more positive shares that sum to 1")
    for tier in config.shares:
        check_source_name(tier)
    for name in config.sources or ():
        if name not in sources:
            raise ConfigError(f"quality.sources: no source {name!r}; found {', '.join(sources)}")


@dataclass(frozen=True)
class Classifier:
    """weights: (2**18,) float32; thresholds: least score of each tier but the last, best first; tiers: their names."""

    weights: np.ndarray
    intercept: float
    tiers: tuple[str, ...]
    thresholds: tuple[float, ...] = ()

    def score(self, text: str) -> float:
        """Estimated probability that the text is one of the good ones."""
        found = features(text)
        margin = self.intercept + float(self.weights[found].sum()) / max(1, len(found)) ** 0.5
        return float(1 / (1 + np.exp(-np.clip(margin, -30, 30))))

    def tier(self, score: float) -> str:
        """The best tier whose threshold the score reaches."""
        return next(
            (t for t, least in zip(self.tiers, self.thresholds, strict=False) if score >= least), self.tiers[-1]
        )


def features(text: str) -> np.ndarray:
    """Which of 2**18 features the text has: hashes of its words and pairs of words, ascending. (features,) int64."""
    words = word_hashes(tokens(text[:_CHARACTERS]))
    hashes = np.concatenate([words, window_hashes(words, 2)])
    return np.unique((hashes >> _SHIFT).astype(np.int64))


def train(config: QualityConfig, documents: Iterable[str], folder: Path) -> Classifier:
    """Learn from the examples, set the thresholds by the scores of `documents`, and save it all in `folder`."""
    texts, labels = _examples(config)
    held_out = np.array([int(content_hash(text)[:8], 16) < config.held_out * 2**32 for text in texts])
    for name, part in (("training", ~held_out), ("held-out", held_out)):
        for label in (0, 1):
            if (found := int((part & (labels == label)).sum())) < _FEWEST_EXAMPLES:
                kind = "good" if label else "bad"
                raise ArtifactError(
                    f"quality: {found} different {kind} {name} examples, expected {_FEWEST_EXAMPLES} or more; give more"
                )
    rows = [features(text) for text in texts]
    weights, intercept = _fit([row for row, out in zip(rows, held_out, strict=True) if not out], labels[~held_out])
    untiered = Classifier(weights, intercept, tuple(config.shares))
    scores = np.array([untiered.score(text) for text, out in zip(texts, held_out, strict=True) if out])
    facts = {"examples": len(texts), **measured(scores, labels[held_out])}
    thresholds = _thresholds([untiered.score(text) for text in documents], config.shares)
    classifier = Classifier(weights, intercept, untiered.tiers, thresholds)
    save(classifier, {**facts, "thresholds": dict(zip(classifier.tiers, thresholds, strict=False))}, folder)
    return classifier


def _examples(config: QualityConfig) -> tuple[list[str], np.ndarray]:
    """Distinct texts with their labels; a text given with both labels teaches nothing and is left out."""
    given: dict[str, set[int]] = {}
    for text, label in chain(
        _of_sources(config.high, 1, config), _of_sources(config.low, 0, config), _labelled(config.labelled)
    ):
        given.setdefault(text, set()).add(label)
    pairs = [(text, labels.pop()) for text, labels in given.items() if len(labels) == 1]
    return [text for text, _ in pairs], np.array([label for _, label in pairs])


def _of_sources(sources: list[AnySource], label: int, config: QualityConfig) -> Iterator[tuple[str, int]]:
    for source in sources:
        documents = source.documents("documents", Invalid(source.on_invalid))
        yield from ((document.text, label) for document in islice(documents, config.max_examples))


def _labelled(path: Path | None) -> Iterator[tuple[str, int]]:
    for where, row in read_jsonl(path, "**/*.jsonl", Invalid("error")) if path else ():
        if not isinstance(row.get("text"), str) or not isinstance(row.get("label"), int | str):
            raise ArtifactError(f"{where}: found {', '.join(row)}; expected text and label (1 or high, 0 or low)")
        if row["label"] not in _LABELS:
            raise ArtifactError(f"{where}: label {row['label']!r}, expected 1 or high, 0 or low")
        yield row["text"], _LABELS[row["label"]]


def _fit(rows: list[np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Logistic regression; each text's features share one unit of length, so that long texts do not shout."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    places = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([np.full(len(row), max(1, len(row)) ** -0.5) for row in rows])
    matrix = csr_matrix((values, np.concatenate(rows), places), shape=(len(rows), 1 << _BITS))
    model = LogisticRegression(C=_REGULARISATION, max_iter=200, class_weight="balanced").fit(matrix, labels)
    return model.coef_[0].astype(np.float32), float(model.intercept_[0])


def measured(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What held-out examples say. auc: chance that a good one scores above a bad one.

    calibration_error: mean distance between predicted and observed share of good ones over ten bins of the score,
    weighted by their examples (Naeini et al. 2015); calibration: these bins.
    """
    good, bad = scores[labels == 1], scores[labels == 0]
    ordered = np.sort(bad)
    below = (np.searchsorted(ordered, good, "left") + np.searchsorted(ordered, good, "right")) / 2
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    rows, error = list[dict[str, Any]](), 0.0
    for number in np.unique(bins).tolist():
        mine = bins == number
        predicted, observed = float(scores[mine].mean()), float(labels[mine].mean())
        error += int(mine.sum()) * abs(predicted - observed) / len(scores)
        name = f"{number / _BINS:.1f} to {(number + 1) / _BINS:.1f}"
        counts = {"documents": int(mine.sum()), "predicted": round(predicted, 4), "observed": round(observed, 4)}
        rows.append({"name": name, **counts})
    return {
        "held_out_examples": len(scores), "accuracy": round(float(((scores >= 0.5) == labels).mean()), 4),
        "auc": round(float(below.mean() / len(bad)), 4), "brier": round(float(((scores - labels) ** 2).mean()), 4),
        "calibration_error": round(error, 4), "calibration": rows,
    }  # fmt: skip


def _thresholds(scores: list[float], shares: Mapping[str, float]) -> tuple[float, ...]:
    if not scores:
        raise ArtifactError("quality: the sources that shall be sorted hold no document after the filters")
    above = np.cumsum(list(shares.values()))[:-1]
    return tuple(round(float(value), 6) for value in np.quantile(scores, np.clip(1 - above, 0, 1)))


def save(classifier: Classifier, facts: Mapping[str, Any], folder: Path) -> None:
    """Write the classifier and what is known about it."""
    with artifact.replacing(folder / _WEIGHTS) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, weights=classifier.weights, intercept=classifier.intercept)
    shown = {"tiers": classifier.tiers, "threshold_of_each": classifier.thresholds, **facts}
    artifact.write_json(folder / _FACTS, shown)


def is_saved(folder: Path) -> bool:
    """Whether `load` will find a classifier."""
    return (folder / _FACTS).is_file()


def load(folder: Path) -> tuple[Classifier, dict[str, Any]]:
    """A saved classifier and what is known about it. Raises `ArtifactError` naming the file at fault."""
    facts = artifact.read_json(folder / _FACTS)
    try:
        with np.load(folder / _WEIGHTS) as stored:
            weights, intercept = stored["weights"], float(stored["intercept"])
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder / _WEIGHTS}: not a classifier: {error}") from None
    return Classifier(weights, intercept, tuple(facts["tiers"]), tuple(facts["threshold_of_each"])), facts
