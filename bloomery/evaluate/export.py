"""The stage `export`: the final Hugging Face directory, done only when `transformers` loads it and agrees."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.config import Config, DatasetDir, Field, ModelDir
from bloomery.data.chat import encode_prompt, stop_token_ids
from bloomery.data.dataset import read_rows
from bloomery.data.tokenizer import Message
from bloomery.errors import ArtifactError, ConfigError
from bloomery.evaluate import parity
from bloomery.model import hf
from bloomery.train.model_folder import ModelFolder, open_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SENTENCES = (
    "What is 17 + 25?", "Name three colours.", "(12-5)*3", "Write a function that adds two numbers.",
    "Why is the sky blue?", "1", "Translate 'good morning' into French.", "Solve 3x + 5 = 20.",
)  # fmt: skip


class ExportConfig(Config):
    """Write a model for others, and prove that `transformers` reads what we trained."""

    model: ModelDir = Field(description="the model to export: a stage's folder or a Hugging Face directory")
    prompts: DatasetDir | None = Field(
        default=None, description="dataset of kind prompts to compare on; null: a few built-in sentences"
    )
    num_prompts: int = Field(default=8, gt=0, description="prompts on which logits and greedy text are compared")
    max_new_tokens: int = Field(default=32, gt=0, description="length of each greedy text compared, tokens")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="type of stored weights")
    max_logit_difference: float = Field(
        default=1e-4, gt=0, description="largest difference allowed between fp32 logits of the two implementations"
    )


def run(config: ExportConfig, out: Path) -> Manifest:
    """Stage `export`: writes `model/`. Raises `ArtifactError` where `transformers` differs, and is then not done."""
    with Output(out, "export", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        start = open_model(config.model)
        chats = _chats(config, start)
        _write(config, start, output.model)
        found = _compare(config, start, output.model, chats)
        files = {file.name: file.stat().st_size for file in sorted(output.model.iterdir())}
        return output.finish("model", found | {"bytes": sum(files.values()), "files": files})


def _write(config: ExportConfig, start: ModelFolder, folder: Path) -> None:
    """Weights, sizes and tokenizer; generation stops where our engine does, at the end of a turn too."""
    model = hf.load(start.path)
    stops = stop_token_ids(start.tokenizer)
    model.config = model.config.model_copy(update={"eos_token_id": stops[0] if len(stops) == 1 else stops})
    hf.save(model, folder, DTYPES[config.dtype])
    start.tokenizer.save(folder)


def _compare(
    config: ExportConfig, start: ModelFolder, folder: Path, chats: Sequence[Sequence[Message]]
) -> dict[str, Any]:
    """The figures of the comparison; raises `ArtifactError` at the first that is not as it must be."""
    parity.require_equal_weights(start.path, folder, DTYPES[config.dtype])
    parity.require_equal_tokenizer(folder, start.tokenizer, chats)
    prompts = [encode_prompt(start.tokenizer, chat) for chat in chats]
    model, peer = hf.load(folder, torch.float32), parity.load_peer(folder)
    logits = parity.compare_logits(model, peer, prompts)
    if not logits.max <= config.max_logit_difference:
        raise ArtifactError(
            f"{folder}: logits differ from transformers' by up to {logits.max:.3g} (mean {logits.mean:.3g}), at most "
            f"{config.max_logit_difference:g} allowed; this model must not be published as it is"
        )
    tokens = parity.require_equal_greedy(
        model, peer, prompts, stop_token_ids(start.tokenizer), config.max_new_tokens, config.max_logit_difference
    )
    return {
        "logit_difference_max": logits.max,
        "logit_difference_mean": logits.mean,
        "greedy_tokens_equal": tokens,
        "prompts_compared": len(prompts),
    }


def _chats(config: ExportConfig, start: ModelFolder) -> list[Sequence[Message]]:
    """The chats to compare on: the first that leave room for the text compared."""
    room = start.room(config.max_new_tokens)
    found: list[Sequence[Message]] = [[{"role": "user", "content": text}] for text in _SENTENCES]
    if config.prompts is not None:
        found = [row["prompt"] for row in read_rows(config.prompts, "prompts")]
    fitting = (chat for chat in found if len(encode_prompt(start.tokenizer, chat)) <= room)
    chosen = list(islice(fitting, config.num_prompts))
    if not chosen:
        raise ConfigError(
            f"max_new_tokens: {config.max_new_tokens} leaves {room} tokens of the model's context for a prompt, and "
            "none is as short; choose less, or give prompts"
        )
    return chosen


def check(config: ExportConfig) -> dict[str, Any]:
    """Whether a Hugging Face class can hold the model, as far as it exists already."""
    try:
        start = open_model(config.model)
    except ArtifactError as error:
        return {"dtype": config.dtype, "inputs": str(error)}
    return {"dtype": config.dtype, "architecture": hf.export_config(start.config)["architectures"][0]}
