"""Stage `blend`: tokenize and pack each source, fix by exact counts what training will read, and serve it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.data.blend_config import (
    FEW,
    BlendConfig,
    BlendSource,
    Held,
    check_settings,
    described,
    phase_ends,
    planned,
    refuse_too_many_epochs,
    stated,
    used_sources,
)
from bloomery.data.blended import PLAN, TOKENIZER, VALIDATION, BlendedRows
from bloomery.data.dataset import read_rows, write_card
from bloomery.data.document import content_hash
from bloomery.data.overlap import Contents, refuse_hidden_epochs, shared_tokens
from bloomery.data.plan import Plan
from bloomery.data.tokenizer import Tokenizer, load_tokenizer
from bloomery.data.tokens import RowWriter, shard
from bloomery.errors import ArtifactError, ConfigError
from bloomery.progress import say

_DOCUMENTS_PER_ENCODE = 512


def check(config: BlendConfig) -> dict[str, Any]:
    """What `run` would refuse before reading any data, the length of the plan and, where stated, its epochs."""
    check_settings(config)
    return described(config)


def run(config: BlendConfig, out: Path) -> Manifest:
    """Stage `blend`: Arrow files of packed rows by source, `plan.json`, and the tokenizer that made them."""
    check(config)
    tokenizer = load_tokenizer(config.tokenizer)
    with Output(out, "blend", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        before = _before(config)
        names = [name for name in config.sources if name in {*used_sources(config), *before.sources}]
        found = {name: _write_source(name, tokenizer, config, output) for name in names}
        stats = {name: written.stats for name, written in found.items()}
        plan = _plan(config, {name: written.held(config.unit) for name, written in found.items()}, before)
        shared = shared_tokens({name: written.contents for name, written in found.items()})
        caps = {name: source.max_epochs for name, source in config.sources.items()}
        refuse_hidden_epochs(plan, shared, {name: source["tokens"] for name, source in stats.items()}, caps)
        _write_plan(output, plan, config, tokenizer.vocab_size)
        splits = {"train": f"{artifact.DATA}/*.arrow"}
        if any(source["validation_rows"] for source in stats.values()):
            splits["validation"] = f"{VALIDATION}/*.arrow"
        write_card(output.path, splits)
        tokenizer.save(output.path / TOKENIZER)
        return output.finish("tokens", _summary(plan, stats, shared, config.seq_len))


def _before(config: BlendConfig) -> Plan:
    """The part of the plan that `after` brings; empty without."""
    if config.after is None:
        return Plan((), (), (), config.seed)
    found = BlendedRows(artifact.resolve(config.after, "dataset")).plan
    if config.seed != found.seed:
        raise ConfigError(f"seed: {config.seed}, the plan of {config.after} has {found.seed}; give the same")
    if (config.after_sequences or 0) > found.num_sequences:
        raise ConfigError(
            f"after_sequences: {config.after_sequences} is more than the {found.num_sequences} of {config.after}"
        )
    return found.until(config.after_sequences or found.num_sequences)


def _plan(config: BlendConfig, held: dict[str, Held], before: Plan) -> Plan:
    """The plan of the settings, behind the one it goes on from."""
    _say_where_stated_otherwise(config, held)
    plan = before.then(planned(config, held))
    refuse_too_many_epochs(plan, config)
    for name, drawn in zip(plan.sources, plan.drawn.tolist(), strict=True):
        if drawn < FEW:
            say(f"blend  {name}: only {drawn} sequences are read; under {FEW}, what it does can hardly be measured")
    return plan


def _say_where_stated_otherwise(config: BlendConfig, held: dict[str, Held]) -> None:
    for name, guess in stated(config).items():
        if name in held and abs(held[name].tokens - guess.tokens) > 0.01 * guess.tokens:
            say(
                f"blend  {name}: {held[name].tokens:,.0f} tokens were counted, unique_tokens says {guess.tokens:,.0f}; "
                "the plan follows the count"
            )


def _write_plan(output: Output, plan: Plan, config: BlendConfig, vocab_size: int) -> None:
    begun = plan.num_sequences - config.num_sequences
    ends = [end for end in plan.ends if end <= begun] + [begun + end for end in phase_ends(config)]
    digests = {name: artifact.file_digest(shard(output.data, name)) for name in plan.sources}
    shape = {"seq_len": config.seq_len, "vocab_size": vocab_size, "phase_ends": ends, "files": digests}
    artifact.write_json(output.path / PLAN, {**plan.to_json(), **shape, "digest": plan.digest})


def _summary(
    plan: Plan, stats: dict[str, dict[str, Any]], shared: dict[tuple[str, str], int], seq_len: int
) -> dict[str, Any]:
    sources = {}
    for name, drawn, epochs in zip(plan.sources, plan.drawn.tolist(), plan.epochs.tolist(), strict=True):
        found = stats[name]
        tokens = round(drawn * found["tokens"] / max(1, found["rows"]))
        training = {"training_sequences": drawn, "training_tokens": tokens, "epochs": round(epochs, 3)}
        sources[name] = {**found, **training}
        say(f"blend  {name}: {found['tokens']:,} tokens, {drawn:,} sequences to train on, {epochs:.2f} epochs")
    return {
        "sequences": plan.num_sequences,
        "tokens": plan.num_sequences * seq_len,
        "plan": plan.digest,
        "sources": sources,
        "shared_tokens": {f"{first}, {second}": tokens for (first, second), tokens in shared.items()},
    }


@dataclass(frozen=True)
class _Written:
    """One source on disk: its counts, and what its documents are."""

    stats: dict[str, Any]
    contents: Contents

    def held(self, unit: str) -> Held:
        rows, tokens = self.stats["rows"], self.stats["tokens"]
        documents = self.stats["documents"] - self.stats["validation_documents"]
        return Held(rows, tokens, {"tokens": tokens, "sequences": rows, "documents": documents}[unit] / max(1, rows))


def _write_source(name: str, tokenizer: Tokenizer, config: BlendConfig, output: Output) -> _Written:
    """Tokenize, split and pack one source. Raises `ArtifactError` when nothing is left."""
    source = config.sources[name]
    stats = {"documents": 0, "empty": 0, "split": 0, "validation_documents": 0}
    hashes, lengths = list[int](), list[int]()
    shape = (config.seq_len + 1, config.packing, tokenizer.pad_token_id or 0)
    with (
        RowWriter(shard(output.data, name), *shape) as train,
        RowWriter(shard(output.path / VALIDATION, name), *shape) as validation,
    ):
        for text, tokens in _encoded(_texts(source, config.downsample), tokenizer):
            if not text:
                stats["empty"] += 1
                continue
            digest = content_hash(text)
            held_out = int(digest[:8], 16) < config.validation_fraction * 2**32
            stats["documents"] += 1
            stats["validation_documents"] += held_out
            stats["split"] += len(tokens) > config.seq_len + 1
            (validation if held_out else train).add(tokens)
            if not held_out:
                hashes.append(_rank(digest))
                lengths.append(len(tokens))
    if not train.rows:
        reason = (
            "all fell into the validation split; lower validation_fraction"
            if stats["documents"]
            else "the corpus is empty"
        )
        raise ArtifactError(f"sources.{name}: {source.path} has no documents to train on: {reason}")
    if config.validation_fraction and not validation.rows:
        say(f"blend  {name}: too few documents for a validation split of {config.validation_fraction:g}; it has none")
    rows = {"rows": train.rows, "tokens": train.tokens, "validation_rows": validation.rows}
    return _Written({**stats, **rows}, Contents.of(hashes, lengths))


def _texts(source: BlendSource, share: float) -> Iterator[str]:
    """The texts of a source, or the share of them whose hashes are lowest: a larger share holds those of a smaller."""
    read = partial(read_rows, source.path, "documents", source.source)
    texts = (row["text"] for row in read())
    if share == 1:
        return texts
    last = last_kept([(_rank(content_hash(row["text"])), len(row["text"])) for row in read()], share)
    return (text for text in texts if _rank(content_hash(text)) <= last)


def _rank(digest: str) -> int:
    """A place in a random order of documents; independent of what decides the validation split."""
    return int(digest[8:24], 16)


def last_kept(documents: Sequence[tuple[int, int]], share: float) -> int:
    """The largest rank to keep, so that the characters of the kept are as near to `share` of all as documents allow.

    documents: (rank, characters). At least one is kept.
    """
    ranks, characters = np.array(sorted(documents), dtype=np.uint64).reshape(-1, 2).T
    if not len(ranks):
        return -1
    kept = np.cumsum(characters.astype(np.float64))
    return int(ranks[int(np.argmin(np.abs(kept - share * kept[-1])))])


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
