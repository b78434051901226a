"""What every Hugging Face family says of itself: names and sizes, both ways. A family is data, one file each."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bloomery.model.config import ModelConfig

TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """One `model_type`.

    Attributes:
        model_type: as in `config.json`, and `ModelConfig.family`.
        architecture: the class in transformers.
        ties_head: the class fills `lm_head` from the embeddings when `tie_word_embeddings` is set; the file does not
            hold it then.
        fixed: keys of `config.json` that can only have this value here; anything else is refused by name.
    """

    model_type: str
    architecture: str
    ties_head: bool = True
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @abstractmethod
    def refusals(self, config: ModelConfig) -> list[str]:
        """Why the Hugging Face class cannot hold this model; empty when it can."""

    @abstractmethod
    def read_config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """`config.json` → the fields of `ModelConfig`; `KeyError` for a missing key, `ConfigError` for a feature that
        is not supported."""

    @abstractmethod
    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The fields of `ModelConfig` → `config.json`, in the spellings that old and new readers look for."""

    @abstractmethod
    def file_name(self, config: ModelConfig, name: str) -> str:
        """The parameter's name in the file; for stacked experts without their numbers."""

    @abstractmethod
    def canonical(self, name: str) -> str | None:
        """The published form of a name found in a file; `None` for tensors that are no part of the model."""

    @abstractmethod
    def found_pattern(self, names: set[str]) -> dict[int, str]:
        """What the tensor names say each layer is."""


def present(raw: Mapping[str, Any], keys: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """The keys that `config.json` gives a value, under the same names."""
    return {key: raw[key] for key in keys if raw.get(key) is not None}


def reasons(found: Mapping[str, object]) -> list[str]:
    """The reasons that apply."""
    return [reason for reason, applies in found.items() if applies]
