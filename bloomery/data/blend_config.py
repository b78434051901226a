"""The settings of a blend: sources, phases, rules for weights; and the plan that follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator

from bloomery.config import Config, DatasetDir, Field, TokenizerDir
from bloomery.data import weights
from bloomery.data.dataset import check_source_name
from bloomery.data.plan import Phase, Plan, check_weights, largest_remainder, make_plan
from bloomery.errors import ConfigError

FEW = 100
"""Sequences of a source under which a run says hardly anything about it."""


class BlendSource(Config):
    """One source of the blend."""

    path: DatasetDir = Field(description="dataset folder of kind documents")
    source: str | None = Field(default=None, description="only this source of the folder; all of it where not given")
    weight: float | None = Field(
        default=None, description="share of the blend, in `unit`, relative to the other weights; 0 leaves it out"
    )
    max_epochs: float | None = Field(
        default=None, description="refuse a plan that goes through the source more often", gt=0
    )
    quality: float = Field(default=0.0, description="how good it is, for the rule water-filling; any scale")
    unique_tokens: int | None = Field(
        default=None, description="its tokens, for plans made before they are counted", gt=0
    )


class BlendRule(Config):
    """Weights from what is known of each source."""

    type: Literal["natural", "temperature", "unimax", "water-filling"] = Field(
        description="natural: by tokens; temperature: by tokens^alpha; unimax: all the same under their max_epochs; "
        "water-filling: tokens^alpha · exp(beta · quality) between floors and max_epochs"
    )
    alpha: float | None = Field(default=None, ge=0, description="temperature and water-filling: power of the tokens")
    beta: float | None = Field(default=None, description="water-filling: weight of a source's quality")
    sources: tuple[str, ...] | None = Field(default=None, description="sources it covers; all where not given")

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        needed = {"temperature": {"alpha"}, "water-filling": {"alpha", "beta"}}.get(self.type, set())
        for name in ("alpha", "beta"):
            if (getattr(self, name) is not None) != (name in needed):
                raise ValueError(f"{name}: {'needed by' if name in needed else 'without effect under'} {self.type}")
        return self


class BlendPhase(Config):
    """One of several phases that follow one another."""

    share: float = Field(description="share of the sequences, relative to the other phases", gt=0, allow_inf_nan=False)
    weights: dict[str, float] | None = Field(
        default=None, description="source name → share of this phase, relative; a name left out is 0 (or give rule)"
    )
    rule: BlendRule | None = Field(default=None, description="how weights follow from the sources (or give weights)")
    floors: dict[str, float] = Field(default={}, description="source name → least share of this phase, of 1")
    ramp: float = Field(
        default=0.0, ge=0, le=1,
        description="share of this phase, at its start, over which weights move from those before; 0: at once",
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.weights is None) == (self.rule is None):
            raise ValueError("weights, rule: give exactly one of the two")
        return self


class BlendConfig(Config):
    """Tokenize, pack and blend sources."""

    sources: dict[str, BlendSource] = Field(description="name → source")
    tokenizer: TokenizerDir = Field(description="tokenizer or model folder")
    seq_len: int = Field(description="positions of a training sequence, in tokens", ge=2)
    sequences: int | None = Field(
        default=None, description="length of the plan, in sequences (give this or tokens)", gt=0
    )
    tokens: int | None = Field(default=None, description="length of the plan, in positions: sequences × seq_len", gt=0)
    unit: Literal["tokens", "sequences", "documents"] = Field(
        default="tokens", description="what weights are shares of; converted with each source's measured row"
    )
    weights_total: float | None = Field(
        default=None, gt=0, description="what the weights of each phase must add up to; any sum where not given"
    )
    phases: list[BlendPhase] = Field(
        default=[], description="phases with weights of their own; one phase with the sources' weights where empty"
    )
    downsample: float = Field(
        default=1.0, gt=0, le=1,
        description="keep this share of every source's documents, by a hash of their text, and of the plan's length: "
        "a proxy that repeats every source as often as the whole would",
    )  # fmt: skip
    after: DatasetDir | None = Field(
        default=None, description="a blend of the same sources to go on from: its plan's first sequences come first"
    )
    after_sequences: int | None = Field(
        default=None, gt=0, description="how many sequences of `after` come first; all where not given"
    )
    packing: Literal["whole", "concatenated"] = Field(
        default="whole",
        description="whole documents best-fitted into rows with padding, or documents end to end, cut at row ends",
    )
    validation_fraction: float = Field(
        default=0.01, description="share of each source's documents kept out of training", ge=0, lt=1
    )
    seed: int = Field(default=0, description="seed of the order within each source")

    @property
    def num_sequences(self) -> int:
        """Length of the plan, in sequences, without what `after` brings."""
        if (self.sequences is None) == (self.tokens is None):
            raise ConfigError("sequences, tokens: give exactly one of the two; it is the length of the plan")
        whole = self.sequences or self.tokens // self.seq_len  # type: ignore[operator]
        return max(1, round(whole * self.downsample))


@dataclass(frozen=True)
class Held:
    """What is known of a source: training rows, tokens in them, and how many of the blend's `unit` a row holds."""

    rows: int
    tokens: float
    row_units: float


def stated(config: BlendConfig) -> dict[str, Held]:
    """What the settings say of the sources, for plans before the data is counted: rows are taken to be full."""
    return {
        name: Held(max(1, round(tokens / config.seq_len)), tokens, 1.0)
        for name, source in config.sources.items()
        if source.unique_tokens is not None
        for tokens in [source.unique_tokens * config.downsample]
    }


def check_settings(config: BlendConfig) -> None:
    """Raises `ConfigError` naming the phase or source at fault, before any data is read."""
    _refuse_repeated_sources(config)
    given = {name: source.weight for name, source in config.sources.items()}
    if config.after is None and config.after_sequences is not None:
        raise ConfigError("after_sequences: has no effect without after; remove it")
    if not config.phases:
        missing = [name for name, weight in given.items() if weight is None]
        if missing:
            raise ConfigError(f"sources.{missing[0]}.weight: missing; a value is required")
        _check_phase(config, "sources", given)  # type: ignore[arg-type]
        return
    ignored = [name for name, weight in given.items() if weight is not None]
    if ignored:
        raise ConfigError(f"sources.{ignored[0]}.weight: has no effect beside phases; remove it")
    for number, phase in enumerate(config.phases):
        where = f"phases.{number}"
        named = [*(phase.weights or ()), *phase.floors, *((phase.rule and phase.rule.sources) or ())]
        for name in named:
            if name not in given:
                raise ConfigError(f"{where}.weights.{name}: no such source; known: {', '.join(given)}")
        if phase.ramp and not number:
            raise ConfigError(f"{where}.ramp: no phase before it to move from; remove it")
        if phase.weights is not None:
            _check_phase(config, f"{where}.weights", phase.weights)
            _check_floors(phase, where)
        elif phase.floors and phase.rule.type != "water-filling":  # type: ignore[union-attr]
            raise ConfigError(f"{where}.floors: have no effect on this rule; take water-filling, or remove them")


def _check_phase(config: BlendConfig, where: str, given: Mapping[str, float]) -> None:
    check_weights(given, where)
    total = sum(given.values())
    if config.weights_total is not None and abs(total - config.weights_total) > 1e-9 * config.weights_total:
        raise ConfigError(f"{where}: they add up to {total:.10g}, expected weights_total {config.weights_total:.10g}")


def _check_floors(phase: BlendPhase, where: str) -> None:
    assert phase.weights is not None
    total = sum(phase.weights.values())
    for name, floor in phase.floors.items():
        share = phase.weights.get(name, 0.0) / total
        if share < floor:
            raise ConfigError(f"{where}.weights.{name}: its share {share:.4g} is below its floor {floor:g}; raise it")


def _refuse_repeated_sources(config: BlendConfig) -> None:
    seen: dict[tuple[Path, str | None], str] = {}
    for name, source in config.sources.items():
        check_source_name(name)
        place = (Path(source.path).resolve(), source.source)
        if place in seen:
            raise ConfigError(
                f"sources.{name}: the same data as sources.{seen[place]}; its epochs would be counted wrong; keep one"
            )
        seen[place] = name


def used_sources(config: BlendConfig) -> list[str]:
    """The sources that any phase may draw from, in the order of the settings."""
    if not config.phases:
        return [name for name, source in config.sources.items() if source.weight]
    drawn: set[str] = set()
    for phase in config.phases:
        if phase.rule is not None:
            drawn |= set(phase.rule.sources or config.sources)
        drawn |= {name for name, weight in (phase.weights or {}).items() if weight}
    return [name for name in config.sources if name in drawn]


def phase_ends(config: BlendConfig) -> list[int]:
    """Where each phase ends, in sequences."""
    shares = [phase.share for phase in config.phases] or [1.0]
    return np.cumsum(largest_remainder(shares, config.num_sequences)).tolist()


def planned(config: BlendConfig, held: Mapping[str, Held]) -> Plan:
    """The plan over the sources in `held`. Raises `ConfigError` where a rule, a source or a cap cannot be met."""
    names = [name for name in config.sources if name in held]
    rows, row_units = [held[name].rows for name in names], [held[name].row_units for name in names]
    return make_plan(names, rows, row_units, _phases(config, held), config.num_sequences, config.seed)


def _phases(config: BlendConfig, held: Mapping[str, Held]) -> list[Phase]:
    if not config.phases:
        return [Phase(1.0, {name: source.weight or 0.0 for name, source in config.sources.items()})]
    found, read = [], dict.fromkeys(held, 0.0)
    lengths = np.diff([0, *phase_ends(config)]).tolist()
    for number, (phase, length) in enumerate(zip(config.phases, lengths, strict=True)):
        given = phase.weights
        if given is None:
            given = _by_rule(config, phase, number, held, read, length)
        found.append(Phase(phase.share, given, phase.ramp))
        for name, tokens in _tokens(config, given, held, length).items():
            read[name] += tokens
    return found


def _tokens(config: BlendConfig, given: Mapping[str, float], held: Mapping[str, Held], length: int) -> dict[str, float]:
    """Tokens of each source in a phase of `length` sequences with these weights."""
    rows = {name: given.get(name, 0.0) / max(known.row_units, 1e-9) for name, known in held.items()}
    total = sum(rows.values()) or 1.0
    return {name: length * rows[name] / total * known.tokens / max(1, known.rows) for name, known in held.items()}


def _by_rule(
    config: BlendConfig, phase: BlendPhase, number: int, held: Mapping[str, Held], read: Mapping[str, float],
    length: int,
) -> dict[str, float]:  # fmt: skip
    """The weights of a phase in `unit`; `read`: tokens that the phases before have read, which count for the caps."""
    rule = phase.rule
    assert rule is not None
    names = rule.sources or tuple(used_sources(config))
    unknown = [name for name in names if name not in held]
    if unknown:
        raise ConfigError(
            f"sources.{unknown[0]}.unique_tokens: missing; before the data is counted, rule {rule.type} of "
            f"phases.{number} needs it"
        )
    tokens = {name: held[name].tokens for name in names}
    caps = {name: config.sources[name].max_epochs for name in names}
    left = {name: max(0.0, cap - read[name] / tokens[name]) for name, cap in caps.items() if cap is not None}
    budget = float(length * config.seq_len)
    for _ in range(20):  # rows with padding: how many tokens the phase reads depends on what it reads
        try:
            shares = _ruled(rule, tokens, budget, left, config, phase.floors)
        except ConfigError as error:
            raise ConfigError(f"phases.{number}: {error}") from None
        per_row = {name: held[name].tokens / held[name].rows for name in names}
        budget, before = length / sum(shares[name] / per_row[name] for name in names), budget
        if abs(budget - before) <= 1e-9 * before:
            break
    return {name: share / per_row[name] * held[name].row_units for name, share in shares.items()}


def _ruled(
    rule: BlendRule, tokens: dict[str, float], budget: float, left: dict[str, float], config: BlendConfig,
    floors: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    quality = {name: config.sources[name].quality for name in tokens}
    if rule.type == "natural":
        return weights.natural(tokens)
    if rule.type == "temperature":
        return weights.temperature(tokens, rule.alpha or 0.0)
    if rule.type == "unimax":
        return weights.unimax(tokens, budget, left)
    return weights.water_filling(tokens, budget, quality, left, rule.alpha or 0.0, rule.beta or 0.0, floors)


def refuse_too_many_epochs(plan: Plan, config: BlendConfig) -> None:
    """Raises `ConfigError` naming every source that the plan goes through more often than its `max_epochs`."""
    over = too_many_epochs(plan, config)
    if over:
        raise ConfigError("\n".join(over.values()))


def too_many_epochs(plan: Plan, config: BlendConfig) -> dict[str, str]:
    """Source → what is wrong, for those over their cap by more than the sequence that rounding may add."""
    found = {}
    for name, rows, drawn in zip(plan.sources, plan.rows, plan.drawn.tolist(), strict=True):
        most = config.sources[name].max_epochs if name in config.sources else None
        if most is not None and drawn > most * rows + 1:
            found[name] = (
                f"sources.{name}: the plan goes through it {drawn / max(1, rows):.2f} times, more than max_epochs "
                f"{most:g}; lower its weight, shorten the plan or add data"
            )
    return found


def described(config: BlendConfig) -> dict[str, Any]:
    """For `bloomery check`: the length of the plan; with `unique_tokens` for all sources, the epochs as well."""
    found: dict[str, Any] = {"sequences": config.num_sequences, "tokens": config.num_sequences * config.seq_len}
    found["phases"] = max(1, len(config.phases))
    held = stated(config)
    if config.unit != "documents" and all(name in held for name in used_sources(config)):
        plan = planned(config, held)
        refuse_too_many_epochs(plan, config)
        found["epochs"] = dict(zip(plan.sources, np.round(plan.epochs, 3).tolist(), strict=True))
    return found
