"""A file's tensors ↔ a decoder's: every one used exactly once, or the call fails."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bloomery.errors import ArtifactError
from bloomery.model.config import MIXERS, ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.model.hf.family import Family

_HEAD, _EMBEDDINGS = "lm_head.weight", "embeddings.weight"
_FUSED, _HALVES = ".experts.gate_up_proj", (".experts.gate_proj", ".experts.up_proj")


def gather(path: Path, family: Family, decoder: Decoder, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's state dict out of a file's tensors."""
    config = decoder.config
    named = ((family.canonical(name), tensor) for name, tensor in _unfused(found))
    renamed = {name: tensor for name, tensor in named if name is not None}
    _audit_pattern(path, config, family.found_pattern(set(renamed)))
    tensors: dict[str, Tensor] = {}
    for name, own in decoder.state_dict().items():
        parts = file_names(family, config, name, own)
        if name == _HEAD and config.tie_word_embeddings and parts[0] not in renamed:
            tensors[name] = tensors[_EMBEDDINGS]
        else:
            tensors[name] = _assemble(path, name, own, parts, renamed)
    if renamed:
        raise ArtifactError(
            f"{path}: tensors with no place in the model: {_some(sorted(renamed))}; correct config.json, or remove them"
        )
    if config.tie_word_embeddings and not torch.equal(tensors[_HEAD], tensors[_EMBEDDINGS]):
        raise ArtifactError(
            f"{path}: tie_word_embeddings is set, but lm_head and embeddings differ; correct config.json"
        )
    return tensors


def stored(family: Family, decoder: Decoder, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a decoder's file, in the published layout."""
    tensors: dict[str, Tensor] = {}
    for name, own in decoder.state_dict().items():
        if name == _HEAD and decoder.config.tie_word_embeddings and family.ties_head:
            continue
        cast = own.detach().to("cpu", torch.float32 if name.endswith("e_score_correction_bias") else dtype)
        parts = file_names(family, decoder.config, name, own)
        pieces = [cast.clone()] if len(parts) == 1 and ".experts." not in name else [each.clone() for each in cast]
        tensors.update(zip(parts, pieces, strict=True))
    return tensors


def file_names(family: Family, config: ModelConfig, name: str, tensor: Tensor) -> list[str]:
    """Where a tensor of the decoder is stored: one name, or one per expert for stacked experts."""
    found = family.file_name(config, name)
    if ".experts." not in name:
        return [found]
    module, _, projection = found.rpartition(".")
    return [f"{module}.{expert}.{projection}.weight" for expert in range(len(tensor))]


def _unfused(found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Experts' gate and up, which transformers 5 holds as one matrix, apart."""
    for name, tensor in found.items():
        if name.endswith(_FUSED) and tensor.dim() == 3:
            prefix = name.removesuffix(_FUSED)
            yield from ((prefix + half, piece) for half, piece in zip(_HALVES, tensor.chunk(2, dim=1), strict=False))
        else:
            yield name, tensor


def _assemble(path: Path, name: str, own: Tensor, parts: list[str], renamed: dict[str, Tensor]) -> Tensor:
    """One of the decoder's tensors; takes what it uses out of `renamed`."""
    stacked = _stacked_name(parts[0])
    if ".experts." in name and stacked in renamed:
        tensor = renamed.pop(stacked).contiguous()
    else:
        missing = [part for part in parts if part not in renamed]
        if missing:
            raise ArtifactError(
                f"{path}: missing tensors: {_some(missing)}; the copy is incomplete or config.json is wrong"
            )
        pieces = [renamed.pop(part) for part in parts]
        shapes = {piece.shape: part for part, piece in zip(parts, pieces, strict=True)}
        if len(shapes) > 1:
            raise ArtifactError(f"{path}: {name}: the experts' shapes differ: {_some([*shapes.values()])}")
        tensor = torch.stack(pieces) if ".experts." in name else pieces[0]
    if tensor.shape != own.shape:
        raise ArtifactError(f"{path}: {parts[0]}: shape {tuple(tensor.shape)} for {name}, expected {tuple(own.shape)}")
    return tensor


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


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
