"""Tensors in safetensors files, in one piece or in shards with an index."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bloomery import artifact
from bloomery.errors import ArtifactError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder by its file name. Raises `ArtifactError` for what is missing or damaged."""
    tensors: dict[str, Tensor] = {}
    for file in _tensor_files(path):
        try:
            with safe_open(file, "pt") as opened:
                tensors.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 - not a dict
        except (SafetensorError, FileNotFoundError) as error:
            raise ArtifactError(f"{file}: cannot be read as safetensors: {error}; copy the model again") from None
    return tensors


def _tensor_files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        return [path / name for name in sorted(set(artifact.read_json(path / INDEX)["weight_map"].values()))]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    raise ArtifactError(f"{path}: found neither {SINGLE} nor {INDEX}; expected a model in safetensors format")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Writes `tensors` to folder `path`, a new shard whenever the last would exceed `shard_bytes`."""
    shards = _split(tensors, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        with artifact.replacing(path / name) as temporary:
            save_file({key: tensors[key].contiguous() for key in shard}, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        artifact.write_json(
            path / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
    for file in [*path.glob("model*.safetensors"), path / INDEX]:
        if file.name not in names and not (file.name == INDEX and len(shards) > 1):
            file.unlink(missing_ok=True)


def _split(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `bfloat16`, as written in `config.json`."""
    return str(dtype).removeprefix("torch.")
