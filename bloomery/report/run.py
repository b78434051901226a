"""A run folder as the report sees it: stages in the order of their life, and who fed whom."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bloomery import artifact
from bloomery import config as configs
from bloomery.artifact import Manifest
from bloomery.errors import ArtifactError, ConfigError

Status = Literal["finished", "unfinished", "damaged"]
Family = Literal["data", "tokenizer", "model", "evaluation", "other"]
_FAMILIES: dict[str, Family] = {"model": "model", "tokenizer": "tokenizer", "evaluation": "evaluation"}
_MAKES: dict[str, Family] = {
    "prepare": "data", "blend": "data", "curate": "data", "tokenizer": "tokenizer", "evaluate": "evaluation",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage's folder. `manifest` is None while it is unfinished; `problem` says why one could not be read."""

    name: str
    path: Path
    manifest: Manifest | None
    state: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    problem: str = ""
    sources: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        return "damaged" if self.problem else "finished" if self.manifest else "unfinished"

    @property
    def stage(self) -> str:
        """The stage's verb: `sft`, `evaluate` …"""
        return self.manifest.stage if self.manifest else str(self.state.get("stage", self.name))

    @property
    def key(self) -> str | None:
        return self.manifest.key if self.manifest else self.state.get("key")

    @property
    def inputs(self) -> dict[str, str]:
        """Dotted config field → digest of what it read."""
        return self.manifest.inputs if self.manifest else dict(self.state.get("inputs", {}))

    @property
    def summary(self) -> dict[str, Any]:
        return self.manifest.summary if self.manifest else {}

    @property
    def seconds(self) -> float | None:
        """Wall time of all attempts; None where an unfinished stage was killed before it could note it."""
        return self.manifest.seconds if self.manifest else self.state.get("seconds")

    @property
    def product(self) -> str:
        """What it makes: a manifest kind, or nothing known yet."""
        return self.manifest.kind if self.manifest else ""

    @property
    def family(self) -> Family:
        """Which lane of the picture it belongs to: by what it made, or by what its stage is known to make."""
        if self.product:
            return "data" if self.product in artifact.DATASET_KINDS else _FAMILIES.get(self.product, "other")
        return _MAKES.get(self.stage, "model")

    @property
    def config(self) -> dict[str, Any]:
        """The resolved settings; empty where the file cannot be read."""
        try:
            data = configs.parse_yaml(self.config_text)
        except ConfigError:
            return {}
        return data if isinstance(data, dict) else {}


@dataclass(frozen=True)
class Run:
    """All stages of one run folder, in order."""

    path: Path
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def finished(self) -> list[Stage]:
        return [stage for stage in self.stages if stage.manifest]

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def read_run(path: Path) -> Run:
    """Every stage folder inside `path`. Raises `ArtifactError` when there is none."""
    path = Path(path)
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such folder; expected a run's folder, as `bloomery run` writes it")
    folders = [folder for folder in sorted(path.iterdir()) if _is_stage(folder)]
    if not folders:
        raise ArtifactError(
            f"{path}: holds no stage; expected one folder per stage, each with {artifact.CONFIG} or "
            f"{artifact.MANIFEST}. Run a recipe first, or name the folder above the stages' own"
        )
    stages = sorted((_read_stage(folder) for folder in folders), key=_moment)
    return Run(path, tuple(_with_sources(stage, stages) for stage in stages))


def _is_stage(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in (artifact.CONFIG, artifact.MANIFEST))


def _read_stage(folder: Path) -> Stage:
    manifest, state, problem = None, {}, ""
    try:
        manifest = artifact.read_manifest(folder, missing_ok=True)
        state = artifact.read_state(folder)
    except ArtifactError as error:
        problem = str(error)
    file = folder / artifact.CONFIG
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    metrics = artifact.Metrics(folder / artifact.METRICS).read()
    return Stage(folder.name, folder, manifest, state, text, metrics, problem)


def _moment(stage: Stage) -> tuple[float, str]:
    """Inputs finish before their readers, so the order of finishing is one of the graph; the unfinished go last."""
    return (stage.manifest.finished if stage.manifest else float("inf"), stage.name)


def _with_sources(stage: Stage, stages: list[Stage]) -> Stage:
    """An input's digest is the key of the stage that made it; an input of no stage here came from outside."""
    owners = {other.key: other.name for other in stages if other.key and other is not stage}
    sources = tuple(dict.fromkeys(owners[digest] for digest in stage.inputs.values() if digest in owners))
    foreign = [field for field, digest in stage.inputs.items() if digest not in owners]
    outside = tuple(dict.fromkeys(Path(str(_lookup(stage.config, field))).name or field for field in foreign))
    return dataclasses.replace(stage, sources=sources, outside=outside)


def _lookup(value: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        if isinstance(value, dict):
            value = value.get(part, dotted)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return dotted
    return value
