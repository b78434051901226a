"""Decoders as Hugging Face model folders, both ways and strictly: every tensor is accounted for or the call fails."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bloomery import artifact
from bloomery.config import build
from bloomery.errors import ArtifactError, ConfigError
from bloomery.model.config import MIXERS, ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.model.hf import llama, nemotron_h
from bloomery.model.hf.files import dtype_name, read_tensors, write_tensors

FAMILIES: dict[str, ModuleType] = {"llama": llama, "nemotron_h": nemotron_h}
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
    tensors = _gather(path, decoder, read_tensors(path))
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
    family = FAMILIES.get(raw.get("model_type"))
    if family is None:
        raise ConfigError(
            f"{file}: model_type {raw.get('model_type')!r} is not supported; choose {', '.join(FAMILIES)}"
        )
    if raw.get("quantization_config"):
        raise ConfigError(f"{file}: quantization_config: quantised weights are not supported; load the original model")
    for key, expected in family.FIXED.items():
        if raw.get(key, expected) != expected:
            raise ConfigError(f"{file}: {key} {raw[key]!r} is not supported; only {expected!r} is")
    try:
        fields = family.read_config(raw)
    except KeyError as error:
        raise ConfigError(f"{file}: {error.args[0]}: missing; a value is required") from None
    return build(ModelConfig, fields, where=str(file))


def _gather(path: Path, decoder: Decoder, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's state dict out of a file's tensors, each checked and used exactly once."""
    family = FAMILIES[decoder.config.family]
    renamed = {family.canonical(name): tensor for name, tensor in found.items()}
    renamed.pop(None, None)
    _audit_pattern(path, decoder.config, family.found_pattern(set(renamed)))
    tensors: dict[str, Tensor] = {}
    for name, own in decoder.state_dict().items():
        parts = _file_names(decoder.config, name, own)
        if name == "lm_head.weight" and decoder.config.tie_word_embeddings and parts[0] not in renamed:
            tensors[name] = tensors["embeddings.weight"]
        else:
            tensors[name] = _assemble(path, name, own, parts, renamed)
    if renamed:
        raise ArtifactError(f"{path}: tensors with no place in the model: {_some(sorted(renamed))}")
    if decoder.config.tie_word_embeddings and not torch.equal(tensors["lm_head.weight"], tensors["embeddings.weight"]):
        raise ArtifactError(
            f"{path}: tie_word_embeddings is set, but lm_head and embeddings differ; correct config.json"
        )
    return tensors


def _assemble(path: Path, name: str, own: Tensor, parts: list[str], renamed: dict[str | None, Tensor]) -> Tensor:
    """One of the decoder's tensors; takes what it uses out of `renamed`."""
    stacked = _stacked_name(parts[0])
    if len(parts) > 1 and stacked in renamed:
        tensor = renamed.pop(stacked)
    else:
        missing = [part for part in parts if part not in renamed]
        if missing:
            raise ArtifactError(
                f"{path}: missing tensors: {_some(missing)}; the copy is incomplete or config.json is wrong"
            )
        pieces = [renamed.pop(part) for part in parts]
        tensor = pieces[0] if len(parts) == 1 else torch.stack(pieces)
    if tensor.shape != own.shape:
        raise ArtifactError(f"{path}: {parts[0]}: shape {tuple(tensor.shape)} for {name}, expected {tuple(own.shape)}")
    return tensor


def _file_names(config: ModelConfig, name: str, tensor: Tensor) -> list[str]:
    """Where a tensor of the decoder is stored: one name, or one per expert for stacked experts."""
    stored = FAMILIES[config.family].file_name(config, name)
    if ".experts." not in name:
        return [stored]
    module, _, projection = stored.rpartition(".")
    return [f"{module}.{expert}.{projection}.weight" for expert in range(len(tensor))]


def _stacked_name(part: str) -> str:
    """`….experts.0.up_proj.weight` → `….experts.up_proj`, as transformers 5 holds it in memory."""
    return part.replace(".experts.0.", ".experts.").removesuffix(".weight")


def _audit_pattern(path: Path, config: ModelConfig, found: dict[int, str]) -> None:
    """A shifted layer would load and produce fluent noise, so names and pattern must agree layer by layer."""
    for layer, kind in enumerate(config.pattern):
        if found.get(layer, kind) != kind:
            raise ArtifactError(
                f"{path}: layer {layer} is {MIXERS[kind]} in the pattern {config.pattern!r}, "
                f"but its tensors are those of {MIXERS[found[layer]]}; correct the pattern in config.json"
            )
    if found and max(found) >= config.num_layers:
        raise ArtifactError(f"{path}: tensors of layer {max(found)}, but the pattern has {config.num_layers} layers")


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
    raw = export_config(config) | {"dtype": dtype_name(dtype or decoder.embeddings.weight.dtype)}
    with artifact.explained(path):
        path.mkdir(parents=True, exist_ok=True)
    write_tensors(path, _stored(decoder, dtype or decoder.embeddings.weight.dtype), shard_bytes)
    generation = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")}
    artifact.write_json(path / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    artifact.write_json(path / "config.json", raw)


def export_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model; raises `ConfigError` when no Hugging Face class can hold it."""
    family = FAMILIES[config.family]
    reasons = family.refusals(config)
    if reasons:
        raise ConfigError(
            f"family {config.family}: {family.ARCHITECTURE} cannot hold this model: {'; '.join(reasons)}. "
            f"Change the model, or choose another family of {', '.join(FAMILIES)}"
        )
    return {"architectures": [family.ARCHITECTURE], "model_type": config.family, **family.write_config(config)}


def _stored(decoder: Decoder, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    omitted = decoder.config.tie_word_embeddings and FAMILIES[decoder.config.family].TIES_HEAD
    for name, own in decoder.state_dict().items():
        if name == "lm_head.weight" and omitted:
            continue
        stored = own.detach().to("cpu", torch.float32 if name.endswith("e_score_correction_bias") else dtype)
        parts = _file_names(decoder.config, name, own)
        pieces = [stored.clone()] if len(parts) == 1 else [expert.clone() for expert in stored]
        tensors.update(zip(parts, pieces, strict=True))
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
