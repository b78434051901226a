"""`bloomery convert`: any supported folder written anew, and the proof that it is still the same model."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bloomery import artifact
from bloomery.errors import ArtifactError, ConfigError
from bloomery.evaluate import parity
from bloomery.evaluate.export import DTYPES
from bloomery.model import hf
from bloomery.model.config import ModelConfig

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip


def convert(source: Path, out: Path, dtype: str | None = None, family: str | None = None) -> dict[str, Any]:
    """Writes the model in `source` to `out` and compares what the two compute, layer by layer, one model in memory at a
    time, in float32 on the CPU.

    Args:
        source: a Hugging Face folder of a supported family, or a stage's folder.
        out: must not exist, or be empty.
        dtype: `float32`, `bfloat16` or `float16`; default: that of the source's embeddings.
        family: the model type to write; default: the source's.

    Returns:
        `family`, `dtype`, `tokens` compared on, `carried` files, and `parity` with a `parity.Difference` each for
        `original` and `export` (ours against transformers) and `original_to_export` (ours against ours).

    Raises:
        ArtifactError: `out` is in use, the source is damaged, or transformers does not take a tensor as it is.
        ConfigError: a feature that is not supported, or a family that cannot hold the model.
    """
    source = artifact.resolve(source, "model")
    _require_free(out)
    config = _write(source, out, dtype, family)
    carried = _carry(source, out, config.family)
    written = artifact.read_json(out / "config.json")
    ids = parity.probe_tokens(config)
    return {
        "source": str(source),
        "out": str(out),
        "family": config.family,
        "dtype": written["dtype"],
        "tokens": ids.numel(),
        "carried": carried,
        "parity": {name: asdict(difference) for name, difference in _compare(source, out, ids).items()},
    }


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out}: exists and is not an empty folder; nothing is overwritten, choose another name")


def _write(source: Path, out: Path, dtype: str | None, family: str | None) -> ModelConfig:
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is unknown; choose {', '.join(DTYPES)}")
    if family is not None and family not in hf.FAMILIES:
        raise ConfigError(f"--family: {family!r} is not supported; choose {', '.join(hf.FAMILIES)}")
    config = hf.load_config(source)
    config = config.model_copy(update={"family": family or config.family})
    hf.export_config(config)  # refuse before reading the weights
    model = hf.load(source)
    model.config = config
    with artifact.replacing(out) as folder:
        hf.save(model, folder, DTYPES[dtype] if dtype else None)
    return config


def _carry(source: Path, out: Path, family: str) -> list[str]:
    """Copies the tokenizer; and the generation settings, which may say more than ours, unless the class changes."""
    names = list(TOKENIZER_FILES)
    if hf.load_config(source).family == family:
        names.append("generation_config.json")
    found = [name for name in names if (source / name).is_file()]
    with artifact.explained(out):
        for name in found:
            shutil.copyfile(source / name, out / name)
    return found


def _compare(source: Path, out: Path, ids: torch.Tensor) -> dict[str, parity.Difference]:
    original, export = (parity.trace(hf.load(folder, torch.float32), ids) for folder in (source, out))
    return {
        "original": parity.compare_traces(original, parity.trace(parity.load_peer(source), ids)),
        "export": parity.compare_traces(export, parity.trace(parity.load_peer(out), ids)),
        "original_to_export": parity.compare_traces(original, export),
    }
