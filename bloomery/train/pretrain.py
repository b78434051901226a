"""Stage `pretrain`: next-token training on the blended rows of stage `blend`, from seeded weights or from a model."""

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import model_validator

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.config import RUN_ONLY, Config, DatasetDir, Field, ModelDir, build
from bloomery.data.blended import TOKENIZER, BlendedRows
from bloomery.data.pack import Batch
from bloomery.data.tokenizer import Tokenizer, load_tokenizer
from bloomery.errors import ConfigError, DivergenceError
from bloomery.model import hf
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.settings import ParallelConfig
from bloomery.parallel.world import world
from bloomery.progress import say
from bloomery.train.account import Account
from bloomery.train.alarms import Alarms, Watch
from bloomery.train.branch import load_trunk
from bloomery.train.loop import LoopConfig, TrainState, is_due
from bloomery.train.losses import next_token
from bloomery.train.memory import activation_bytes, state_bytes
from bloomery.train.model_folder import default_device
from bloomery.train.run import resumable, what_runs_in_fp8
from bloomery.train.spread import rank_sizes, row_batches, save_model, spread
from bloomery.train.validation import validation_losses


class NewModel(ModelConfig):
    """A model to be made. What is left out of the vocabulary comes from the tokenizer of the tokens."""

    vocab_size: int = Field(default=0, ge=0, description="rows of the embedding table; 0: as many as there are tokens")

    def _check_tokens(self) -> None:
        if self.vocab_size:
            super()._check_tokens()


class PretrainConfig(Config):
    """Train a model on blended tokens."""

    tokens: DatasetDir = Field(description="folder written by stage blend")
    model: NewModel | None = Field(default=None, description="the model to make (give this, init or trunk)")
    init: ModelDir | None = Field(default=None, description="the model to go on from, with a fresh optimizer")
    trunk: ModelDir | None = Field(
        default=None,
        description="a run of this stage to branch off: its weights, optimizer, step and place in the data",
    )
    trunk_step: int | None = Field(
        default=None, gt=0, description="the trunk's step to go on after; its last where not given"
    )
    loop: LoopConfig = Field(description="how to train")
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), json_schema_extra=RUN_ONLY, description="how the work is spread over ranks"
    )
    branch_steps: tuple[int, ...] = Field(
        default=(), json_schema_extra=RUN_ONLY, description="steps whose checkpoints stay, for runs that branch off"
    )
    alarms: Alarms = Field(
        default=Alarms(), json_schema_extra=RUN_ONLY, description="when validation losses of sources are worth a line"
    )
    validation_rows: int = Field(default=64, ge=0, description="held-out rows of each source to validate on; 0: none")
    seed: int = Field(default=0, description="seed of the initial weights")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(origin is not None for origin in (self.model, self.init, self.trunk)) != 1:
            raise ValueError("model, init: give exactly one of the two, or trunk; it is where the weights come from")
        if self.trunk_step is not None and self.trunk is None:
            raise ValueError("trunk_step: has no effect without trunk; remove it")
        late = [step for step in self.branch_steps if step > self.loop.max_steps]
        if late:
            raise ValueError(f"branch_steps: {late[0]} is after the last step, {self.loop.max_steps}")
        return self

    @property
    def origin(self) -> Path | None:
        """The model folder that the sizes come from; `None` for a new model."""
        return self.init or self.trunk


def check(config: PretrainConfig) -> dict[str, Any]:
    """Size, memory and work of the run, without making the model; raises what `run` would refuse at its start.

    Before the tokens exist, what depends on their vocabulary or row length is left out.
    """
    loop = config.loop
    found: dict[str, Any] = {"steps": loop.max_steps, "sequences": loop.max_steps * loop.batch_size}
    built = (Path(config.tokens) / artifact.MANIFEST).is_file()
    if not built and not (config.model and config.model.vocab_size):
        return found
    model = _model_config(config, _tokenizer(config)) if built else build(ModelConfig, config.model.model_dump())  # type: ignore[union-attr]
    hf.export_config(model)
    parameters = model.count_parameters()
    found |= {"parameters": parameters, "active_parameters": model.count_parameters(active=True)}
    found |= {"state_bytes": state_bytes(parameters), **what_runs_in_fp8(model, loop, default_device())}
    if not built:
        return found | rank_sizes(model, config.parallel, loop)
    seq_len = _checked_rows(config, model).seq_len
    tokens = loop.max_steps * loop.batch_size * seq_len
    activations = activation_bytes(model, loop.micro_batch_size, seq_len, loop.activation_checkpointing)
    found |= {"activation_bytes": activations, **rank_sizes(model, config.parallel, loop, seq_len)}
    return found | {"tokens": tokens, "flops": model.flops_per_token(seq_len) * tokens}


def run(config: PretrainConfig, out: Path) -> Manifest:
    """Stage `pretrain`: `model/` with weights and tokenizer, and what was read of each source."""
    tokenizer = _tokenizer(config)
    model_config = _model_config(config, tokenizer)
    hf.export_config(model_config)
    rows = _checked_rows(config, model_config)
    with Output(out, "pretrain", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        state = spread(_initial_model(config, model_config), config.parallel, config.loop, rows.seq_len)
        read = _train(state, rows, config, output)
        save_model(state, model_config, output.model)
        if not world().is_main:
            return output.finish("model", world=world().size)
        tokenizer.save(output.model)
        return output.finish("model", _summary(state, model_config, rows, output, read), world().size)


def _train(state: TrainState, rows: BlendedRows, config: PretrainConfig, output: Output) -> dict[str, Any]:
    """All steps that are left, with validation between them and at each switch of phases; returns what was read."""
    loop, account = config.loop, Account(rows, state)
    switches = {end // loop.batch_size for end in rows.phase_ends[:-1]}  # the last steps of all phases but the last
    if config.trunk is not None:
        load_trunk(Path(config.trunk), config.trunk_step, state, loop)

    def batches_from(position: int) -> Iterator[list[Batch]]:
        account.open()
        return row_batches(rows, position, loop, state.parallel)

    objective = partial(next_token, sources=rows.names)
    for step in resumable(
        output, state, batches_from, objective, loop, before_checkpoint=account.close, branch_steps=config.branch_steps
    ):
        watch = Watch(config.alarms, state.extra.setdefault("alarms", {}))
        watch.trained(step.metrics)
        due = is_due(step.step, loop.validate_every_steps) or step.step in switches
        if config.validation_rows and (due or step.step == loop.max_steps):
            _validate(state, rows, config, output, watch)
    return rows.ledger_summary(account.ledger())


def _validate(state: TrainState, rows: BlendedRows, config: PretrainConfig, output: Output, watch: Watch) -> None:
    """Losses on held-out rows, and what they say about forgetting and learning by heart."""
    held_out = rows.validation(config.loop.micro_batch_size, config.validation_rows)
    found = validation_losses(state.model, held_out, rows.names, config.loop, state.parallel)
    output.metrics.log(state.step, **found)
    phase = bisect_left(rows.phase_ends, state.position)
    read = rows.plan.counts_at(state.position) / np.maximum(1, rows.plan.rows)
    alarms = watch.validated(found, phase, dict(zip(rows.names, read.tolist(), strict=True)))
    if alarms:
        output.metrics.log(state.step, alarms=alarms)
    for text in alarms.values():
        if config.alarms.stop:
            raise DivergenceError(f"step {state.step}: {text}")
        say(f"pretrain  step {state.step}: {text}")


def _tokenizer(config: PretrainConfig) -> Tokenizer:
    artifact.require_kind(config.tokens, "tokens")
    return load_tokenizer(artifact.resolve(config.tokens, "dataset") / TOKENIZER)


def _model_config(config: PretrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The sizes of the model, checked against the tokenizer of the tokens."""
    if config.model is None:
        found = hf.load_config(artifact.resolve(config.origin, "model"))  # type: ignore[arg-type]
        _check_vocabulary("init" if config.init else "trunk", found.vocab_size, config, tokenizer)
        _check_same_tokens(config, tokenizer)
        return found
    given = config.model.model_dump()
    given["vocab_size"] = given["vocab_size"] or tokenizer.vocab_size
    _check_vocabulary("model.vocab_size", given["vocab_size"], config, tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given[name] = getattr(tokenizer, name) if given[name] is None else given[name]
    return build(ModelConfig, given, "model")


def _check_vocabulary(where: str, size: int, config: PretrainConfig, tokenizer: Tokenizer) -> None:
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"{where}: the model has room for {size} tokens, the tokenizer of {config.tokens} has "
            f"{tokenizer.vocab_size}; give the model at least as many, or blend with the model's own tokenizer"
        )


def _check_same_tokens(config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """A vocabulary of the right size with other tokens in it would train on noise."""
    own = load_tokenizer(config.origin).backend.get_vocab(with_added_tokens=True)  # type: ignore[arg-type]
    used = tokenizer.backend.get_vocab(with_added_tokens=True)
    differing = [token for token, number in own.items() if used.get(token) != number]
    if differing:
        raise ConfigError(
            f"{'init' if config.init else 'trunk'}: the tokenizer of {config.origin} and that of {config.tokens} "
            f"differ in {len(differing)} tokens, first {differing[0]!r}; blend with the model's own tokenizer"
        )


def _checked_rows(config: PretrainConfig, model: ModelConfig) -> BlendedRows:
    """The data, with what the loop asks of it checked."""
    rows, asked = BlendedRows(config.tokens), config.loop.max_steps * config.loop.batch_size
    if asked > rows.num_sequences:
        raise ConfigError(
            f"loop: {config.loop.max_steps} steps of {config.loop.batch_size} read {asked} sequences, the plan of "
            f"{config.tokens} holds {rows.num_sequences}; lower max_steps or batch_size, or blend more"
        )
    if rows.seq_len > model.max_position_embeddings:
        raise ConfigError(
            f"model.max_position_embeddings: {model.max_position_embeddings} is less than the {rows.seq_len} positions "
            f"of a row of {config.tokens}; raise it, or blend with a smaller seq_len"
        )
    return rows


def _initial_model(config: PretrainConfig, model_config: ModelConfig) -> Decoder:
    """The same weights on every rank."""
    torch.manual_seed(config.seed)
    if config.init is None:
        return Decoder(model_config)
    return hf.load(artifact.resolve(config.init, "model"), torch.float32)


def _summary(
    state: TrainState, model: ModelConfig, rows: BlendedRows, output: Output, read: dict[str, Any]
) -> dict[str, Any]:
    """Headline numbers, read back from the metrics so that a resumed run says the same; only the speed is its own."""
    steps = [row for row in output.metrics.read() if "loss" in row]
    validations = [row for row in output.metrics.read() if "validation_loss" in row]
    validation = {name: value for name, value in (validations[-1] if validations else {}).items() if name != "step"}
    if state.position < rows.num_sequences:
        say(f"pretrain  read {state.position} of the {rows.num_sequences} sequences planned")
    return {
        "parameters": model.count_parameters(),
        "steps": state.step,
        "tokens": state.position * rows.seq_len,
        "loss": steps[-1]["loss"],
        **validation,
        "sequences": {name: source["sequences"] for name, source in read.items()},
        "read": read,
        "tokens_per_second": round(sum(row["tokens"] for row in steps) / sum(row["seconds"] for row in steps), 1),
    }
