"""Stage `curate`: a dataset of prompts without those that cannot teach, each left out for a counted reason."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.config import Config, DatasetDir, Field, RawPath
from bloomery.data.dataset import read_rows, text_of, write_rows
from bloomery.data.document import Document, Drops
from bloomery.errors import ArtifactError, ConfigError
from bloomery.posttrain.audit import stored_rows
from bloomery.posttrain.curate import (
    GUESSED,
    by_difficulty,
    long_enough,
    one_wording,
    pass_rates,
    right_tokens,
    solvable,
    verifiable,
    with_difficulty,
)
from bloomery.posttrain.measure_config import MeasureConfig
from bloomery.progress import say
from bloomery.verify.pool import judge

MEASURED = "measured"
"""Folder of the rollouts that were sampled here."""


class CurateConfig(Config):
    """Which prompts are left out."""

    prompts: DatasetDir = Field(description="dataset of kind prompts")
    verifiable: bool = Field(
        default=True, description="drop prompts whose gold answer is refused, or where copying the question is paid"
    )
    rollouts: RawPath | None = Field(
        default=None, description="stored rollouts, a folder of Parquet or JSONL, by which the settings below judge"
    )
    measure: MeasureConfig | None = Field(
        default=None, description="a model that samples such rollouts first; they stay in the folder, in measured/"
    )
    probe: RawPath | None = Field(
        default=None, description="rollouts of a model on the questions that were opened from a choice and marked as "
        "ambiguous; without, these are dropped",
    )  # fmt: skip
    probe_right: int = Field(default=2, description="right rollouts of it that such a question needs", gt=0)
    guessed: float = Field(
        default=GUESSED, description="right answers to a choice that guessing gives with a probability above this do "
        "not count (one-sided binomial test)", gt=0, lt=1,
    )  # fmt: skip
    solvable: bool = Field(
        default=False, description="drop prompts whose gold is not the majority answer of their rollouts"
    )
    above: float | None = Field(default=None, description="keep pass rates above this; 0 drops the never solved", ge=0)
    at_most: float = Field(
        default=1.0, description="keep pass rates up to this; the hard set of AceReason: 0.375", le=1
    )
    min_tokens: int = Field(
        default=0, description="drop prompts whose right completions are shorter than this on average, tokens", ge=0
    )


def check(config: CurateConfig) -> dict[str, Any]:
    """What `run` would refuse before reading any data."""
    asked = config.solvable or config.above is not None or config.at_most < 1 or config.min_tokens
    if config.rollouts is not None and config.measure is not None:
        raise ConfigError("measure: has no effect beside rollouts; keep one of the two")
    if config.rollouts is None and config.measure is None and asked:
        raise ConfigError("rollouts: missing; solvable, above, at_most and min_tokens judge prompts by stored rollouts")
    if config.above is not None and config.above >= config.at_most:
        raise ConfigError(f"above: {config.above:g} is not below at_most ({config.at_most:g}); no prompt could be kept")
    return {"kind": "prompts"}


def run(config: CurateConfig, out: Path) -> Manifest:
    """Stage `curate`: the prompts kept, source by source; the manifest counts the others by reason."""
    check(config)
    with Output(out, "curate", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        drops, unknown = Drops(), Drops()
        kept: dict[str, list[dict[str, Any]]] = {}
        for document in _curated(config, _rollouts(config, output.path, unknown), drops):
            kept.setdefault(document.source, []).append(document.row("prompts"))
        if not kept:
            raise ArtifactError(f"{config.prompts}: no prompt is left; dropped: {drops}")
        for source, rows in kept.items():
            write_rows(output.path, source, rows, "prompts")
        count = sum(map(len, kept.values()))
        say(f"curate  kept {count:,}, dropped {drops}")
        measured = {} if config.measure is None else {"not_measured": dict(unknown.counts)}
        return output.finish("prompts", {"prompts": count, "dropped": dict(drops.counts), **measured})


def _rollouts(config: CurateConfig, out: Path, unknown: Drops) -> Path | None:
    """Where the rollouts are that prompts are judged by; those of `measure` are sampled first."""
    if config.measure is None:
        return config.rollouts
    from bloomery.posttrain.measure import measure  # with torch, which nothing else here needs

    measure(config.measure, config.prompts, out / MEASURED, unknown)
    return out / MEASURED


def _curated(config: CurateConfig, rollouts: Path | None, drops: Drops) -> Iterator[Document]:
    """The documents that pass; the cheapest judgement first."""
    documents = (
        Document(text_of(row), row["id"], row["source"], json.loads(row["metadata"]), row)
        for row in read_rows(config.prompts, "prompts")
    )
    probed = None if config.probe is None else pass_rates(stored_rows(config.probe))
    documents = one_wording(documents, probed, drops, config.probe_right)
    if rollouts is None:
        return verifiable(documents, judge, drops) if config.verifiable else documents
    rows = list(stored_rows(rollouts))
    rates = pass_rates(rows)
    documents = by_difficulty(documents, rates, drops, config.above, config.at_most, config.guessed)
    documents = with_difficulty(documents, rates, config.measure.name if config.measure else str(rollouts))
    if config.min_tokens:
        documents = long_enough(documents, right_tokens(rows), drops, config.min_tokens)
    if config.verifiable:
        documents = verifiable(documents, judge, drops)
    if config.solvable:
        completions: dict[str, list[str]] = {}
        for row in rows:
            completions.setdefault(str(row["id"]), []).append(row["completion"] or "")
        documents = solvable(documents, completions, judge, drops)
    return documents
