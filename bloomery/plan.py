"""From a recipe or a model folder to a mapping for a cluster, explained; and a picture of how it scales."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bloomery import artifact, recipe
from bloomery import config as configs
from bloomery.claim.picture import curves
from bloomery.errors import ConfigError
from bloomery.model import hf
from bloomery.model.config import ModelConfig
from bloomery.parallel import cluster as clusters
from bloomery.parallel.cost import ERROR
from bloomery.parallel.plan import Choice, Plan, choose, describe, parts, scaling, why_slower
from bloomery.parallel.settings import ParallelConfig
from bloomery.parallel.work import Batch

SEQUENCE, SEQUENCES = 4096, 1024
RUNNERS_UP = 4
LARGEST = 4096
"""GPUs up to which scaling is drawn."""


def read(path: Path) -> tuple[ModelConfig, int | None, int | None]:
    """The sizes of a model, with tokens of a sequence and sequences of a step where the file says them.

    path: a recipe with a stage `pretrain`, a YAML file of a model's settings, or a model folder. Raises `ConfigError`.
    """
    if path.suffix not in (".yaml", ".yml"):
        return hf.load_config(artifact.resolve(path, "model")), None, None
    data = configs.read_yaml(path)
    if "stages" not in data:
        return configs.build(ModelConfig, data, where=str(path)), None, None
    _, steps = recipe.load(path)
    base = next((step.config for step in steps if step.stage == "pretrain"), None)
    settings: dict[str, Any] = base.model_dump() if base else {}
    if not settings.get("model"):
        raise ConfigError(f"{path}: no stage pretrain that makes a model; give the folder of a model instead")
    found = {step.stage: step.config.model_dump() for step in steps}
    settings["model"]["vocab_size"] = settings["model"]["vocab_size"] or found.get("tokenizer", {}).get("vocab_size", 0)
    model = configs.build(ModelConfig, settings["model"], where=f"{path}: model")
    return model, found.get("blend", {}).get("seq_len"), settings["loop"]["batch_size"]


def plan(path: Path, cluster: str, seq_len: int | None, sequences: int | None, imbalance: float = 1.0) -> Choice:
    """The mappings for `path` on a cluster such as `128xH100`; what is not given comes from the recipe."""
    known = clusters.parse(cluster)
    model, own_len, own_batch = read(path)
    return choose(model, known, _batch(model, seq_len or own_len, sequences or own_batch, imbalance))


def _batch(model: ModelConfig, seq_len: int | None, sequences: int | None, imbalance: float) -> Batch:
    if imbalance < 1:
        raise ConfigError(f"--imbalance {imbalance:g}: the fullest rank over the mean; expected 1 or more")
    return Batch(seq_len or min(SEQUENCE, model.max_position_embeddings), sequences or SEQUENCES, imbalance=imbalance)


def write(path: Path, choice: Choice) -> list[str]:
    """Put the chosen mapping into the recipe at `path`; comments and everything else stay. Returns what was set.

    Raises `ConfigError` where `path` is no recipe or the choice was made for another sequence or batch than its own.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if path.suffix not in (".yaml", ".yml") or "stages" not in configs.read_yaml(path):
        raise ConfigError(f"{path}: --write needs a recipe, whose stage pretrain then has the mapping")
    _, seq_len, sequences = read(path)
    if (choice.batch.seq_len, choice.batch.sequences) != (seq_len, sequences):
        raise ConfigError(
            f"{path}: chosen for {choice.batch.sequences:,} sequences of {choice.batch.seq_len:,} tokens, but the "
            "recipe says other sizes; change them there, then plan without --sequence and --batch"
        )
    _, steps = recipe.load(path)
    name = next(step.name for step in steps if step.stage == "pretrain")
    for names, value in _written(choice.best[0]).items():
        text = configs.with_setting(text, ("stages", name, *names), value)
    artifact.write_text(path, text)
    recipe.load(path)
    return [".".join((name, *names)) for names in _written(choice.best[0])]


def _written(one: Plan) -> dict[tuple[str, ...], Any]:
    usual = ParallelConfig().model_dump()
    degrees = {key: value for key, value in one.mapping.model_dump().items() if value != usual[key]}
    return {("parallel",): degrees, ("loop", "micro_batch_size"): one.micro_batch_size}


def as_json(choice: Choice) -> dict[str, Any]:
    """Everything that `text` says, for programs: bytes, seconds and shares."""
    return {
        "cluster": choice.cluster.name, "sequence": choice.batch.seq_len, "batch": choice.batch.sequences,
        "mappings_tried": choice.tried, "chosen": _plan_json(choice.best[0]),
        "runners_up": [
            _plan_json(other) | {"why": why_slower(other, choice.best[0])} for other in choice.best[1 : RUNNERS_UP + 1]
        ],
        "too_large": _plan_json(choice.too_large) if choice.too_large else None,
    }  # fmt: skip


def _plan_json(one: Plan) -> dict[str, Any]:
    low, middle, high = one.mfu
    return {
        "mapping": one.mapping.model_dump(), "micro_batch_size": one.micro_batch_size, "seconds": one.timing.seconds,
        "tokens_per_second": one.tokens_per_second, "mfu": middle, "mfu_low": low, "mfu_high": high,
        "seconds_by_part": parts(one), "memory_bytes": asdict(one.memory) | {"total": one.memory.total},
    }  # fmt: skip


def text(choice: Choice) -> str:
    """The choice, where its memory and seconds go, the runners-up with reasons, and the settings to paste."""
    best = choice.best[0]
    lines = [
        f"{choice.cluster.name}, {choice.batch.sequences:,} sequences of {choice.batch.seq_len:,} tokens a step; "
        f"{choice.tried:,} ways tried", "", f"chosen: {describe(best.mapping)}, micro-batch {best.micro_batch_size}",
        f"  {_speed(best)}", f"  memory {_memory(best, choice)}", "  step:",
    ]  # fmt: skip
    whole = best.timing.seconds
    lines += [f"    {name:<30}{seconds / whole:>7.1%}  {seconds:.3g} s" for name, seconds in _shown(best)]
    lines += ["", "runners-up:"]
    for other in choice.best[1 : RUNNERS_UP + 1]:
        lines.append(f"  {describe(other.mapping)}, micro-batch {other.micro_batch_size}: {why_slower(other, best)}")
    if choice.too_large:
        lost = choice.too_large
        gained = best.timing.seconds / lost.timing.seconds - 1
        needs = f"{lost.memory.total / 1e9:.0f} GB of {choice.cluster.device.memory / 1e9:.0f}"
        lines.append(f"  does not fit: {describe(lost.mapping)}: {gained:.0%} faster, but needs {needs} a GPU")
    return "\n".join([*lines, *_notes(choice), "", "settings:", _settings(best)])


def _speed(one: Plan) -> str:
    low, middle, high = one.mfu
    return (
        f"MFU {middle:.1%} ({low:.1%} to {high:.1%}), {one.timing.seconds:.3g} s a step, "
        f"{one.tokens_per_second:,.0f} tokens/s"
    )


def _memory(one: Plan, choice: Choice) -> str:
    by_part = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in asdict(one.memory).items() if size)
    return f"{one.memory.total / 1e9:.1f} of {choice.cluster.device.memory / 1e9:.0f} GB a GPU: {by_part}"


def _shown(one: Plan) -> list[tuple[str, float]]:
    """Parts of a step that take at least a thousandth of it."""
    return [(name, seconds) for name, seconds in parts(one).items() if seconds >= 1e-3 * one.timing.seconds]


def _notes(choice: Choice) -> list[str]:
    device = choice.cluster.name.partition("x")[2]
    notes = [f"The interval holds nine in ten published runs of models that were not fitted (±{ERROR:.0%})."]
    if device != "H100":
        notes.append(f"The constants were fitted to runs on H100; {device} is taken from its data sheet.")
    return ["", *notes]


def _settings(one: Plan) -> str:
    settings = {"parallel": one.mapping.model_dump(), "micro_batch_size": one.micro_batch_size}
    return "".join(f"  {line}\n" for line in configs.to_yaml(settings).splitlines())


def simulate(path: Path, choice: Choice, file: Path) -> None:
    """Draw MFU and tokens/s over the number of GPUs, the batch held or growing with them; bands are the interval."""
    model, _, _ = read(path)
    most = max(LARGEST, choice.cluster.gpus)
    names = (f"{choice.batch.sequences:,} sequences a step", "batch grows with the GPUs")
    arms = {
        name: scaling(model, choice.cluster, choice.batch, most, grow)
        for name, grow in zip(names, (False, True), strict=True)
    }
    panels = {
        "MFU, %": {arm: _band(found, lambda one: 100 * one.timing.mfu) for arm, found in arms.items()},
        "tokens/s": {arm: _band(found, lambda one: one.tokens_per_second) for arm, found in arms.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        curves(file, panels, "GPUs", log_x=True)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--simulate needs {error.name}: pip install 'bloomery[claims]'") from None


def _band(found: list[tuple[int, Plan]], value: Callable[[Plan], float]) -> list[np.ndarray]:
    """Three curves, whose mean is close to the middle one: the ends of the interval and the prediction."""
    return [
        np.array([[gpus, value(one) * factor] for gpus, one in found]) for factor in (1 / (1 + ERROR), 1.0, 1 + ERROR)
    ]
