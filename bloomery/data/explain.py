"""What a blend will read, in whole tokens: of each source, in each phase, and how often it goes through it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bloomery import artifact
from bloomery import config as configs
from bloomery.artifact import Manifest
from bloomery.data.blend_config import (
    FEW,
    BlendConfig,
    Held,
    check_settings,
    phase_ends,
    planned,
    stated,
    too_many_epochs,
    used_sources,
)
from bloomery.data.blended import PLAN
from bloomery.data.plan import Plan
from bloomery.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class Explanation:
    """A plan and what is needed to say it in tokens.

    row_tokens: of a row of each source, on average; unique_tokens: of each source, `None` where not known;
    max_epochs: caps; over: source → what is wrong with its epochs; floors: of each phase, where any are set.
    """

    plan: Plan
    phase_ends: Sequence[int]
    seq_len: int
    row_tokens: Sequence[float]
    unique_tokens: Mapping[str, int | None]
    max_epochs: Mapping[str, float | None] = field(default_factory=dict)
    over: Mapping[str, str] = field(default_factory=dict)
    floors: Sequence[Mapping[str, float]] = ()

    @property
    def sequences(self) -> np.ndarray:
        """(phases, sources) sequences."""
        at = [np.zeros(len(self.plan.sources), dtype=np.int64), *map(self.plan.counts_at, self.phase_ends)]
        return np.diff(np.stack(at), axis=0)

    def tokens(self, sequences: np.ndarray) -> list[int]:
        """Tokens of so many sequences of each source."""
        return [round(count * per_row) for count, per_row in zip(sequences.tolist(), self.row_tokens, strict=True)]

    def epochs(self, sequences: np.ndarray) -> list[float | None]:
        """How often so many sequences of each source go through it; `None` where its size is not known."""
        found = zip(self.plan.sources, self.plan.rows, sequences.tolist(), strict=True)
        return [count / rows if self.unique_tokens.get(name) is not None else None for name, rows, count in found]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        phases, total = self.sequences, self.plan.drawn
        columns = [(found.tolist(), self.tokens(found), self.epochs(found)) for found in (*phases, total)]
        sources = {}
        for index, name in enumerate(self.plan.sources):
            *parts, whole = [
                {"sequences": sequences[index], "tokens": tokens[index], "epochs": epochs[index]}
                for sequences, tokens, epochs in columns
            ]
            known = {"unique_tokens": self.unique_tokens.get(name), "max_epochs": self.max_epochs.get(name)}
            sources[name] = {**known, **whole, "phases": parts}
        shape = {"sequences": self.plan.num_sequences, "seq_len": self.seq_len, "tokens": sum(columns[-1][1])}
        parts = [
            {"sequences": int(found.sum()), "tokens": sum(column[1])}
            for found, column in zip(phases, columns[:-1], strict=True)
        ]
        few = [name for name, count in zip(self.plan.sources, total.tolist(), strict=True) if 0 < count < FEW]
        return {**shape, "phases": parts, "sources": sources, "few": few, "over": dict(self.over)}

    def text(self) -> str:
        """A table for people, and a line for each source that is read too often or hardly at all."""
        found = self.as_json()
        heads = ["source", "unique tokens"]
        for number in range(1, len(found["phases"]) + 1):
            heads += [f"phase {number}: tokens", "share", "epochs"]
        heads += ["all: tokens", "epochs", "at most"]
        rows = [heads]
        for name, source in found["sources"].items():
            row = [name, _number(source["unique_tokens"])]
            for part, phase in zip(source["phases"], found["phases"], strict=True):
                row += [_number(part["tokens"]), f"{part['tokens'] / phase['tokens']:.2%}", _times(part["epochs"])]
            cap = "any" if source["max_epochs"] is None else _times(source["max_epochs"])
            rows.append([*row, _number(source["tokens"]), _times(source["epochs"]), cap])
        totals = [cell for phase in found["phases"] for cell in (_number(phase["tokens"]), "", "")]
        rows.append(["all", "", *totals, _number(found["tokens"]), "", ""])
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(width) if not column else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows
        ]  # fmt: skip
        few = [f"{name}: only {found['sources'][name]['sequences']} sequences; under {FEW} it can hardly be measured"
               for name in found["few"]]  # fmt: skip
        return "\n".join([*lines, *few, f"{found['sequences']:,} sequences of {self.seq_len:,} positions"])


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _times(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def explain_config(config: BlendConfig) -> Explanation:
    """The plan that follows from the settings alone; rows are taken to be full.

    Raises `ConfigError` where a rule needs `unique_tokens` that are not stated.
    """
    check_settings(config)
    if config.unit == "documents":
        raise ConfigError(
            "unit: shares of documents become tokens once they are counted; run the stage and explain its folder"
        )
    if config.after is not None:
        raise ConfigError("after: what comes first is in that blend's folder; run the stage and explain its folder")
    known = stated(config)
    held = dict(known)
    if not any(phase.rule for phase in config.phases):
        held |= {name: Held(1, config.seq_len, 1.0) for name in used_sources(config) if name not in held}
    plan = planned(config, held)
    unique = {name: round(known[name].tokens) if name in known else None for name in plan.sources}
    caps = {name: source.max_epochs for name, source in config.sources.items()}
    over = {name: text for name, text in too_many_epochs(plan, config).items() if name in known}
    full = [float(config.seq_len)] * len(plan.sources)
    floors = [phase.floors for phase in config.phases]
    return Explanation(plan, phase_ends(config), config.seq_len, full, unique, caps, over, floors)


def explain_folder(path: Path) -> Explanation:
    """The plan that the stage has made, with the tokens it counted. `path`: its folder, or the plan.json in it."""
    folder = path.parent if path.name == PLAN else path
    stored, manifest = artifact.read_json(folder / PLAN), artifact.read_manifest(folder, missing_ok=True)
    plan = Plan.from_json(stored)
    counted = _counted(manifest, plan, stored["seq_len"])
    row_tokens = [tokens / max(1, rows) for tokens, rows in zip(counted.values(), plan.rows, strict=True)]
    caps, over, floors = {}, {}, []
    if (folder / artifact.CONFIG).is_file():
        config = configs.load(BlendConfig, folder / artifact.CONFIG)
        caps, over = {name: source.max_epochs for name, source in config.sources.items()}, too_many_epochs(plan, config)
        floors = [phase.floors for phase in config.phases]
    ends = stored.get("phase_ends", plan.ends)
    return Explanation(plan, ends, stored["seq_len"], row_tokens, counted, caps, over, floors)


def _counted(manifest: Manifest | None, plan: Plan, seq_len: int) -> dict[str, int]:
    """Tokens of each source as the stage counted them; of a plan without its folder, as many as full rows hold."""
    if manifest is None:
        return {name: rows * seq_len for name, rows in zip(plan.sources, plan.rows, strict=True)}
    if manifest.kind != "tokens":
        raise ArtifactError(f"holds {manifest.kind}, expected tokens: a folder of stage blend")
    return {name: manifest.summary["sources"][name]["tokens"] for name in plan.sources}
