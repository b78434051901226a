"""The stage `sft`: supervised fine-tuning on chats, learning only what the assistant writes.

Token mean over the assistant's tokens with a global denominator, packed rows without leaks between examples
(AceMath, arXiv 2412.15084; the loss and the packing are those of every stage).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.config import RUN_ONLY, Config, DatasetDir, Field, ModelDir
from bloomery.data.chat import Examples, encode_examples
from bloomery.data.dataset import Row, read_rows
from bloomery.data.document import Drops
from bloomery.data.loader import ExampleRows
from bloomery.data.pack import IGNORE, Batch
from bloomery.data.tokenizer import Tokenizer
from bloomery.errors import ArtifactError, ConfigError
from bloomery.model import hf
from bloomery.parallel.settings import ParallelConfig
from bloomery.parallel.world import world
from bloomery.train.loop import LoopConfig, TrainState
from bloomery.train.losses import next_token
from bloomery.train.model_folder import ModelFolder, default_device, open_model
from bloomery.train.run import resumable, what_runs_in_fp8
from bloomery.train.spread import rank_sizes, row_batches, save_model, spread
from bloomery.train.validation import validation_losses

_SHOWN_TOKENS = 200


class SFTConfig(Config):
    """Fine-tune a model on chats."""

    model: ModelDir = Field(description="the model to start from: a stage's folder or a Hugging Face directory")
    data: DatasetDir = Field(description="dataset of kind messages")
    seq_len: int = Field(gt=0, description="positions in a row; a longer example is dropped and counted, never cut")
    packing: bool = Field(default=True, description="several whole examples in a row, isolated from each other")
    validation_fraction: float = Field(default=0.02, ge=0, lt=1, description="share of the examples held out")
    loop: LoopConfig = Field(description="how it is optimised")
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), json_schema_extra=RUN_ONLY, description="how the work is spread over ranks"
    )
    seed: int = Field(default=0, description="seed of the held-out choice and of the order of examples")


@dataclass(frozen=True)
class _Data:
    """Rows to train on, rows held out (None: no example was), and what was dropped from both."""

    training: ExampleRows
    validation: ExampleRows | None
    drops: Drops


def run(config: SFTConfig, out: Path) -> Manifest:
    """Stage `sft`: writes `model/`; resumes from its newest checkpoint."""
    with Output(out, "sft", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        start = open_model(config.model)
        data = _load_data(config, start)
        state = spread(hf.load(start.path, dtype=torch.float32), config.parallel, config.loop, config.seq_len)
        _train(config, output, state, data)
        save_model(state, start.config, output.model)
        if not world().is_main:
            return output.finish("model", world=world().size)
        start.tokenizer.save(output.model)
        return output.finish("model", _summary(data) | _results(output, data, state), world().size)


def _train(config: SFTConfig, output: Output, state: TrainState, data: _Data) -> None:
    """All steps that are left, with validation between them."""
    loop = config.loop

    def batches_from(position: int) -> Iterator[list[Batch]]:
        return row_batches(data.training, position, loop, state.parallel)

    objective = partial(next_token, sources=data.training.names)
    for step in resumable(output, state, batches_from, objective, loop):
        due = loop.validate_every_steps and step.step % loop.validate_every_steps == 0
        if data.validation and (due or step.step == loop.max_steps):
            held_out = _every_row(data.validation, loop.micro_batch_size)
            found = validation_losses(state.model, held_out, data.validation.names, loop, state.parallel)
            output.metrics.log(step.step, **found)


def _every_row(rows: ExampleRows, micro_batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), micro_batch_size):
        yield rows.batch(start, min(start + micro_batch_size, len(rows)))


def _results(output: Output, data: _Data, state: TrainState) -> dict[str, Any]:
    """Read back from the metrics, which hold the steps before a resume too."""
    rows = output.metrics.read()
    losses = [row["loss"] for row in rows if "loss" in row]
    validations = [row for row in rows if "validation_loss" in row]
    held_out = {name: value for name, value in (validations[-1] if validations else {}).items() if name != "step"}
    return {"steps": state.step, "epochs": data.training.epoch(state.position), "loss": losses[-1], **held_out}


def _load_data(config: SFTConfig, start: ModelFolder) -> _Data:
    if config.seq_len > start.config.max_position_embeddings:
        raise ConfigError(
            f"seq_len: {config.seq_len} is longer than the model's context of {start.config.max_position_embeddings}; "
            "choose less, or extend the context first"
        )
    rows, drops = list(read_rows(config.data, "messages")), Drops()
    held_out = _held_out(len(rows), config.validation_fraction, config.seed)
    kept = [row for number, row in enumerate(rows) if number not in held_out]
    training = _sequences(config, start, kept, drops)
    chosen = [rows[number] for number in sorted(held_out)]
    return _Data(training, _sequences(config, start, chosen, drops) if chosen else None, drops)


def _held_out(count: int, fraction: float, seed: int) -> set[int]:
    """Which examples are held out: at least one where any are asked for and two exist."""
    wanted = max(1, round(count * fraction)) if fraction and count > 1 else 0
    return set(random.Random(f"validation {seed}").sample(range(count), wanted))


def _sequences(config: SFTConfig, start: ModelFolder, rows: list[Row], drops: Drops) -> ExampleRows:
    try:
        examples: Examples = encode_examples(start.tokenizer, rows, config.seq_len, drops)
    except ArtifactError as error:
        raise ArtifactError(f"{config.data}: {error}") from None
    return ExampleRows(examples, config.seq_len, config.seed, start.pad_id, config.packing)


def _summary(data: _Data) -> dict[str, Any]:
    examples = data.training.examples
    return {
        "examples": len(examples),
        "rows": len(data.training),
        "supervised_tokens": int(examples.learnt.sum()),
        "tokens": int(examples.lengths.sum()),
        "validation_examples": len(data.validation.examples) if data.validation else 0,
        "dropped": dict(data.drops.counts),
    }


def check(config: SFTConfig) -> dict[str, Any]:
    """Sizes of the data and the first row with what is learnt marked, as far as the inputs exist already."""
    try:
        start = open_model(config.model)
        data = _load_data(config, start)
    except ArtifactError as error:
        ranks = rank_sizes(None, config.parallel, config.loop)
        return {"steps": config.loop.max_steps, **ranks, "inputs": str(error)}
    epochs = data.training.epoch(config.loop.max_steps * config.loop.batch_size)
    shown = marked(start.tokenizer, data.training.batch(0, 1))
    in_fp8 = what_runs_in_fp8(start.config, config.loop, default_device())
    ranks = rank_sizes(start.config, config.parallel, config.loop, config.seq_len)
    return {"steps": config.loop.max_steps, "epochs": epochs, **in_fp8, **ranks, **_summary(data), "first_row": shown}


def marked(tokenizer: Tokenizer, batch: Batch) -> str:
    """The first row's text, learnt spans between ⟦ and ⟧: what a person looks at before paying for a run."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    pieces: list[tuple[bool, list[int]]] = [(False, [ids[0]])]
    for token, label in zip([*ids[1:], labels[-1]], labels, strict=True):
        learnt = label != IGNORE
        if pieces[-1][0] != learnt:
            pieces.append((learnt, []))
        pieces[-1][1].append(max(token, 0))
    texts = [f"⟦{tokenizer.decode(part)}⟧" if learnt else tokenizer.decode(part) for learnt, part in _first(pieces)]
    return "".join(texts)


def _first(pieces: list[tuple[bool, list[int]]]) -> Iterator[tuple[bool, list[int]]]:
    """As many pieces as a screen holds."""
    shown = 0
    for learnt, part in pieces:
        if shown >= _SHOWN_TOKENS:
            return
        shown += len(part)
        yield learnt, part[:_SHOWN_TOKENS]
