"""A model folder as stages that go on from one see it: tokenizer and sizes, checked against each other; and where a
model goes to work."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bloomery import artifact
from bloomery.data.tokenizer import Tokenizer, load_tokenizer
from bloomery.errors import ConfigError
from bloomery.model import gpu, hf
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder


@dataclass(frozen=True)
class ModelFolder:
    """`path` holds weights, `config.json` and the tokenizer's files."""

    path: Path
    tokenizer: Tokenizer
    config: ModelConfig

    @property
    def pad_id(self) -> int:
        """Fills rows; never learnt and never seen by what is."""
        tokenizer = self.tokenizer
        found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return found or 0

    def room(self, max_new_tokens: int) -> int:
        """Tokens of the context that completions of this length leave for a prompt. Raises `ConfigError` for none."""
        left = self.config.max_position_embeddings - max_new_tokens
        if left < 1:
            raise ConfigError(
                f"max_new_tokens: {max_new_tokens} leaves no room for a prompt in the model's context of "
                f"{self.config.max_position_embeddings}; choose less"
            )
        return left


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def placed(model: Decoder) -> Decoder:
    """The model on `default_device()`, with the kernels that are installed there."""
    device = default_device()
    if device.type == "cuda":
        gpu.apply(model)
    return model.to(device)


def open_model(path: Path) -> ModelFolder:
    """The folder that a config names as its model; no weights are read yet.

    Raises `ArtifactError` for what is missing, `ConfigError` when the tokenizer has entries that the model lacks.
    """
    folder = artifact.resolve(path, "model")
    found = ModelFolder(folder, load_tokenizer(folder), hf.load_config(folder))
    if found.tokenizer.vocab_size > found.config.vocab_size:
        raise ConfigError(
            f"model: {folder}: the tokenizer has {found.tokenizer.vocab_size} entries, the model's vocabulary "
            f"{found.config.vocab_size}; use the tokenizer that the model was trained with"
        )
    return found
