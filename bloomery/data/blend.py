"""Stage `blend`: tokenize and pack each source, fix by exact counts what training will read, and serve it."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.config import Config, DatasetDir, Field, TokenizerDir
from bloomery.data import loader
from bloomery.data.dataset import check_source_name, read_rows, write_card
from bloomery.data.document import content_hash
from bloomery.data.ledger import Ledger
from bloomery.data.pack import Batch, to_batch
from bloomery.data.plan import Plan, check_weights, make_plan
from bloomery.data.tokenizer import Tokenizer, load_tokenizer
from bloomery.data.tokens import RowFile, RowWriter, shard
from bloomery.errors import ArtifactError, ConfigError
from bloomery.progress import say

PLAN, VALIDATION, TOKENIZER = "plan.json", "validation", "tokenizer"
_DOCUMENTS_PER_ENCODE = 512


class BlendSource(Config):
    """One source of the blend."""

    path: DatasetDir = Field(description="dataset folder of kind documents")
    source: str | None = Field(default=None, description="only this source of the folder; all of it where not given")
    weight: float | None = Field(
        default=None, description="share of the training tokens, relative to the other weights; 0 leaves it out"
    )
    max_epochs: float | None = Field(
        default=None, description="refuse a plan that goes through the source more often", gt=0
    )


class BlendPhase(Config):
    """One of several phases that follow one another."""

    share: float = Field(description="share of the sequences, relative to the other phases", gt=0, allow_inf_nan=False)
    weights: dict[str, float] = Field(
        description="source name → share of this phase's tokens, relative; a name left out is 0"
    )


class BlendConfig(Config):
    """Tokenize, pack and blend sources."""

    sources: dict[str, BlendSource] = Field(description="name → source")
    tokenizer: TokenizerDir = Field(description="tokenizer or model folder")
    seq_len: int = Field(description="positions of a training sequence, in tokens", ge=2)
    sequences: int | None = Field(
        default=None, description="length of the plan, in sequences (give this or tokens)", gt=0
    )
    tokens: int | None = Field(default=None, description="length of the plan, in positions: sequences × seq_len", gt=0)
    phases: list[BlendPhase] = Field(
        default=[], description="phases with weights of their own; one phase with the sources' weights where empty"
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
        """Length of the plan, in sequences."""
        if (self.sequences is None) == (self.tokens is None):
            raise ConfigError("sequences, tokens: give exactly one of the two; it is the length of the plan")
        return self.sequences or max(1, self.tokens // self.seq_len)  # type: ignore[operator]


def phases(config: BlendConfig) -> list[tuple[float, dict[str, float]]]:
    """(share, weights) of each phase, checked. Raises `ConfigError` naming the phase or source at fault."""
    given = {name: source.weight for name, source in config.sources.items()}
    if not config.phases:
        missing = [name for name, weight in given.items() if weight is None]
        if missing:
            raise ConfigError(f"sources.{missing[0]}.weight: missing; a value is required")
        check_weights(given, "sources")  # type: ignore[arg-type]
        return [(1.0, given)]  # type: ignore[list-item]
    ignored = [name for name, weight in given.items() if weight is not None]
    if ignored:
        raise ConfigError(f"sources.{ignored[0]}.weight: has no effect beside phases; remove it")
    for number, phase in enumerate(config.phases):
        unknown = sorted(phase.weights.keys() - given.keys())
        if unknown:
            raise ConfigError(f"phases.{number}.weights.{unknown[0]}: no such source; known: {', '.join(given)}")
        check_weights(phase.weights, f"phases.{number}.weights")
    return [(phase.share, phase.weights) for phase in config.phases]


def check(config: BlendConfig) -> dict[str, Any]:
    """What `run` would refuse before reading any data, and the length of the plan."""
    _refuse_repeated_sources(config)
    planned = phases(config)
    return {"sequences": config.num_sequences, "tokens": config.num_sequences * config.seq_len, "phases": len(planned)}


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


def run(config: BlendConfig, out: Path) -> Manifest:
    """Stage `blend`: Arrow files of packed rows by source, `plan.json`, and the tokenizer that made them."""
    check(config)
    planned = phases(config)
    used = {name: source for name, source in config.sources.items() if any(weights.get(name) for _, weights in planned)}
    tokenizer = load_tokenizer(config.tokenizer)
    with Output(out, "blend", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        stats = {name: _write_source(name, source, tokenizer, config, output) for name, source in used.items()}
        row_tokens = [source["tokens"] / max(1, source["rows"]) for source in stats.values()]
        rows = [source["rows"] for source in stats.values()]
        plan = make_plan(list(stats), rows, row_tokens, planned, config.num_sequences, config.seed)
        _refuse_too_many_epochs(plan, config)
        shape = {"seq_len": config.seq_len, "vocab_size": tokenizer.vocab_size}
        artifact.write_json(output.path / PLAN, {**plan.to_json(), **shape, "digest": plan.digest})
        splits = {"train": f"{artifact.DATA}/*.arrow"}
        if any(source["validation_rows"] for source in stats.values()):
            splits["validation"] = f"{VALIDATION}/*.arrow"
        write_card(output.path, splits)
        tokenizer.save(output.path / TOKENIZER)
        return output.finish("tokens", _summary(plan, stats, row_tokens, config.seq_len))


def _summary(plan: Plan, stats: dict[str, dict[str, Any]], row_tokens: Sequence[float], seq_len: int) -> dict[str, Any]:
    sources = {}
    for name, drawn, epochs, per_row in zip(
        plan.sources, plan.drawn.tolist(), plan.epochs.tolist(), row_tokens, strict=True
    ):
        training = {"training_sequences": drawn, "training_tokens": round(drawn * per_row), "epochs": round(epochs, 3)}
        sources[name] = {**stats[name], **training}
        say(f"blend  {name}: {stats[name]['tokens']:,} tokens, {drawn:,} sequences to train on, {epochs:.2f} epochs")
    return {
        "sequences": plan.num_sequences,
        "tokens": plan.num_sequences * seq_len,
        "plan": plan.digest,
        "sources": sources,
    }


def _refuse_too_many_epochs(plan: Plan, config: BlendConfig) -> None:
    for name, epochs in zip(plan.sources, plan.epochs.tolist(), strict=True):
        most = config.sources[name].max_epochs
        if most is not None and epochs > most:
            raise ConfigError(
                f"sources.{name}: the plan goes through it {epochs:.2f} times, more than max_epochs {most:g}; "
                "lower its weight, shorten the plan or add data"
            )


def _write_source(
    name: str, source: BlendSource, tokenizer: Tokenizer, config: BlendConfig, output: Output
) -> dict[str, Any]:
    """Tokenize, split and pack one source; returns its counts. Raises `ArtifactError` when nothing is left."""
    stats = {"documents": 0, "empty": 0, "split": 0, "validation_documents": 0}
    shape = (config.seq_len + 1, config.packing, tokenizer.pad_token_id or 0)
    texts = (row["text"] for row in read_rows(source.path, "documents", source.source))
    with (
        RowWriter(shard(output.data, name), *shape) as train,
        RowWriter(shard(output.path / VALIDATION, name), *shape) as validation,
    ):
        for text, tokens in _encoded(texts, tokenizer):
            if not text:
                stats["empty"] += 1
                continue
            held_out = int(content_hash(text)[:8], 16) < config.validation_fraction * 2**32
            stats["documents"] += 1
            stats["validation_documents"] += held_out
            stats["split"] += len(tokens) > config.seq_len + 1
            (validation if held_out else train).add(tokens)
    if not train.rows:
        reason = (
            "all fell into the validation split; lower validation_fraction"
            if stats["documents"]
            else "the corpus is empty"
        )
        raise ArtifactError(f"sources.{name}: {source.path} has no documents to train on: {reason}")
    if config.validation_fraction and not validation.rows:
        say(f"blend  {name}: too few documents for a validation split of {config.validation_fraction:g}; it has none")
    return {**stats, "rows": train.rows, "tokens": train.tokens, "validation_rows": validation.rows}


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """Each text with its ids as a document: [bos] text eos."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer {tokenizer.name}: has no eos_token, so a document would have no end; "
            "name one in tokenizer_config.json"
        )
    bos = [tokenizer.bos_token_id] if tokenizer.adds_bos else []
    iterator = iter(texts)
    while chunk := list(islice(iterator, _DOCUMENTS_PER_ENCODE)):
        for text, ids in zip(chunk, tokenizer.encode_batch(chunk), strict=True):
            yield text, np.array([*bos, *ids, tokenizer.eos_token_id], dtype=np.int32)


class BlendedRows:
    """The product of the stage: a plan's sequences with random access, and the validation rows.

    `names` are the sources, in the order that `source_ids` count. `ledger` counts what this process really read.
    """

    def __init__(self, path: Path):
        artifact.resolve(Path(path), "dataset")
        artifact.require_kind(Path(path), "tokens")
        stored = artifact.read_json(Path(path) / PLAN)
        self.plan, self.seq_len, self.vocab_size = Plan.from_json(stored), stored["seq_len"], stored["vocab_size"]
        self.names = self.plan.sources
        self._rows = [RowFile(shard(Path(path) / artifact.DATA, name)) for name in self.names]
        held_out = {name: shard(Path(path) / VALIDATION, name) for name in self.names}
        self._validation = {name: RowFile(file) for name, file in held_out.items() if file.exists()}
        self.ledger = Ledger(self.names, self.plan.rows)

    @property
    def num_sequences(self) -> int:
        """Length of the plan."""
        return self.plan.num_sequences

    def batch(self, start: int, stop: int) -> Batch:
        """The micro-batch of the sequences [start, stop)."""
        source, row, _ = self.plan.draw(start, stop)
        taken = [self._rows[s].take(r) for s, r in zip(source.tolist(), row.tolist(), strict=True)]
        lengths = [item[1] for item in taken]
        self.ledger.add(source, np.array([item.sum() for item in lengths]))
        return to_batch(np.stack([item[0] for item in taken]), lengths, sources=source)

    def batches(
        self, position: int, batch_size: int, micro_batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[list[Batch]]:
        """The micro-batches of one step after another, from `position` to the end of the plan."""
        return loader.batches(self, position, batch_size, micro_batch_size, rank, world)

    def validation(self, micro_batch_size: int, max_rows: int | None = None) -> Iterator[Batch]:
        """Held-out rows, source after source, at most `max_rows` of each; `source_ids` tell them apart."""
        for name, rows in self._validation.items():
            source, last = self.names.index(name), min(len(rows), max_rows or len(rows))
            for start in range(0, last, micro_batch_size):
                taken = [rows.take(row) for row in range(start, min(start + micro_batch_size, last))]
                sources = np.full(len(taken), source)
                yield to_batch(np.stack([item[0] for item in taken]), [item[1] for item in taken], sources=sources)
