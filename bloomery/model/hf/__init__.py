"""Decoders as Hugging Face model folders, both ways and strictly: every tensor is accounted for or the call fails."""

from pathlib import Path
from typing import Any

import torch

from bloomery import artifact
from bloomery.config import build
from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.model.hf import llama, mamba2, mistral, mixtral, nemotron_h, qwen2, qwen2_moe, qwen3, qwen3_moe
from bloomery.model.hf.family import Family
from bloomery.model.hf.files import dtype_name, read_tensors, write_tensors
from bloomery.model.hf.tensors import gather, stored

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (llama, mamba2, mistral, mixtral, nemotron_h, qwen2, qwen2_moe, qwen3, qwen3_moe)
}
SHARD_BYTES = 5_000_000_000
KEPT_IN_FLOAT32 = ("A_log", "D", "dt_bias", "e_score_correction_bias")


def load(path: Path | str, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Decoder:
    """The model in a folder with `config.json` and safetensors files, in evaluation mode.

    Args:
        path: the folder.
        dtype: of the parameters; default: as stored. Mamba time scales and router biases are always float32.
        device: where the parameters go; default: CPU.

    Raises:
        ArtifactError: a missing, damaged, superfluous or misshapen tensor, or a layer unlike the pattern.
        ConfigError: a `config.json` with a feature that is not supported, by name.
    """
    path = Path(path)
    config = load_config(path)
    with torch.device("meta"):
        decoder = Decoder(config)
    tensors = gather(path, FAMILIES[config.family], decoder, read_tensors(path))
    for name, tensor in tensors.items():
        exact = name.endswith(KEPT_IN_FLOAT32)
        tensors[name] = tensor.to(device=device, dtype=torch.float32 if exact else dtype)
    decoder.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embeddings.weight
    return decoder.eval()


def load_config(path: Path | str) -> ModelConfig:
    """The sizes in a folder's `config.json`."""
    file = Path(path) / "config.json"
    raw = artifact.read_json(file)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in FAMILIES:
        raise ConfigError(f"{file}: model_type {kind!r} is not supported; choose {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    if raw.get("quantization_config"):
        raise ConfigError(f"{file}: quantization_config: quantised weights are not supported; load the original model")
    for key, expected in family.fixed.items():
        if raw.get(key, expected) != expected:
            raise ConfigError(
                f"{file}: {key} {raw[key]!r} is not supported; only {expected!r} is. Load this model with transformers"
            )
    try:
        fields = family.read_config(raw)
    except KeyError as error:
        raise ConfigError(f"{file}: {error.args[0]}: missing; a value is required") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return build(ModelConfig, fields, where=str(file))


def save(decoder: Decoder, path: Path | str, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads; `config.json` comes last.

    Args:
        decoder: the model.
        path: the folder; other files in it (a tokenizer) stay.
        dtype: of the stored weights; default: that of the embeddings.
        shard_bytes: largest size of one file.

    Raises:
        ConfigError: the family's Hugging Face class cannot hold this model; the reasons are named.
    """
    path, config = Path(path), decoder.config
    dtype = dtype or decoder.embeddings.weight.dtype
    raw = export_config(config) | {"dtype": dtype_name(dtype)}
    with artifact.explained(path):
        path.mkdir(parents=True, exist_ok=True)
    write_tensors(path, stored(FAMILIES[config.family], decoder, dtype), shard_bytes)
    generation = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")}
    artifact.write_json(path / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    artifact.write_json(path / "config.json", raw)


def published(decoder: Decoder, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Copies of the weights on the CPU under the names that `save` gives them, which other engines know too."""
    return stored(FAMILIES[decoder.config.family], decoder, dtype or decoder.embeddings.weight.dtype)


def export_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model; raises `ConfigError` when no Hugging Face class can hold it."""
    family = FAMILIES[config.family]
    reasons = family.refusals(config)
    if reasons:
        raise ConfigError(
            f"family {config.family}: {family.architecture} cannot hold this model: {'; '.join(reasons)}. "
            f"Change the model, or choose another family of {', '.join(FAMILIES)}"
        )
    return {"architectures": [family.architecture], "model_type": config.family, **family.write_config(config)}
