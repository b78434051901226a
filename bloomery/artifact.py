"""What a stage leaves on disk. The only code that names files: directories, manifest, digest, metrics.

A stage's folder holds `config.yaml`, `metrics.jsonl`, its products (`data/`, `model/`, `report.json`, …) and, written
last, `manifest.json`: its presence means the stage is done.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bloomery import config as configs
from bloomery.config import Config, Field
from bloomery.errors import ArtifactError
from bloomery.progress import is_first_rank

MANIFEST, CONFIG, METRICS, MODEL, DATA, CHECKPOINTS = (
    "manifest.json", "config.yaml", "metrics.jsonl", "model", "data", "checkpoints",
)  # fmt: skip
STATE, SECONDS = ".state.json", ".seconds"
REPORT, SAMPLES = "report.json", "samples.parquet"
DATASET_KINDS = ("documents", "tokens", "messages", "preferences", "prompts", "traces")


class Manifest(Config):
    """What a finished stage says about itself."""

    kind: str = Field(description="model, tokenizer, evaluation, or a dataset kind such as documents or prompts")
    stage: str = Field(description="the stage that wrote it")
    key: str = Field(description="hash of the settings and of the digests of all inputs")
    inputs: dict[str, str] = Field(default={}, description="dotted config field → digest of that input")
    version: str = Field(description="bloomery's version")
    seed: int | None = Field(default=None, description="the stage's seed")
    world: int = Field(default=1, description="number of processes that took part")
    seconds: float = Field(description="wall time of all attempts, in seconds")
    finished: float = Field(description="end of the stage, seconds since 1970")
    summary: dict[str, Any] = Field(default={}, description="the stage's headline numbers")


class Output:
    """The folder a stage writes. Use as `with Output(out, "sft", config) as output:`, then `output.finish(...)`.

    Under torchrun every rank opens it, and rank 0 alone writes. Raises `ArtifactError` when `out` holds another
    configuration's work, naming the first setting that differs.
    """

    def __init__(self, path: Path, stage: str, config: Config):
        self.path, self.stage, self.config = Path(path), stage, config
        self.digests = {
            name: digest(resolve(value, kind), kind) for name, (kind, value) in configs.inputs(config).items()
        }
        self.key = key(stage, config, self.digests)
        self.metrics = Metrics(self.path / METRICS)
        self.model, self.data, self.checkpoints = (self.path / name for name in (MODEL, DATA, CHECKPOINTS))
        self._seconds_file = self.path / SECONDS

    @property
    def done(self) -> bool:
        """True when this very configuration has finished here."""
        manifest = read_manifest(self.path, missing_ok=True)
        return manifest is not None and manifest.key == self.key

    def __enter__(self) -> "Output":
        self._started = time.monotonic()
        if is_first_rank():
            self._begin()
        return self

    def _begin(self) -> None:
        if (self.path / CONFIG).exists():
            self._refuse_other_work()
        elif self.path.exists() and {file.name for file in self.path.iterdir()} - {".lock"}:
            raise ArtifactError(
                f"{self.path}: not empty and not written by bloomery; choose another folder or empty it"
            )
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        record = {"stage": self.stage, "key": self.key, "inputs": self.digests}
        write_text(self.path / CONFIG, configs.dump(self.config))
        write_json(self.path / STATE, record)

    def __exit__(self, *_: object) -> None:
        if not is_first_rank():
            return
        if self.path.exists() and not (self.path / MANIFEST).exists():
            self._seconds_file.write_text(str(self._elapsed()))
        self._lock_file.close()

    def _lock(self) -> None:
        """One writer a folder: the lock goes with the process, so a killed run leaves none behind."""
        self._lock_file = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{self.path}: another process is writing here; wait for it or stop it first") from None

    def _elapsed(self) -> float:
        resumed = is_first_rank() and self._seconds_file.exists()
        before = float(self._seconds_file.read_text()) if resumed else 0.0
        return before + time.monotonic() - self._started

    def _refuse_other_work(self) -> None:
        try:
            record = read_json(self.path / STATE)
        except ArtifactError:
            return  # killed between the two first writes: nothing of value is here yet
        if record["key"] == self.key:
            return
        if record["stage"] != self.stage:
            raise ArtifactError(
                f"{self.path}: holds stage {record['stage']!r}, not {self.stage!r}; choose another folder"
            )
        raise ArtifactError(
            f"{self.path}: holds work made with other settings: {self._first_difference(record)}. "
            "Nothing was overwritten; remove the folder to redo the stage, or give another output folder"
        )

    def _first_difference(self, record: dict[str, Any]) -> str:
        try:
            old = configs.identity(configs.load(type(self.config), self.path / CONFIG))
        except configs.ConfigError as error:
            return str(error).splitlines()[0]
        for name, now in configs.flatten(configs.identity(self.config)).items():
            before = configs.flatten(old).get(name)
            if before != now:
                return f"{name} was {before!r} and is now {now!r}"
        for name, now in self.digests.items():
            if record["inputs"].get(name) != now:
                return f"the content of input {name} has changed"
        return "it was written by another version of this stage"

    def finish(self, kind: str, summary: dict[str, Any] | None = None, world: int = 1) -> Manifest:
        """Write the manifest: the stage is done. `world`: processes that took part."""
        manifest = Manifest(
            kind=kind, stage=self.stage, key=self.key, inputs=self.digests, version=version(),
            seed=getattr(self.config, "seed", None), world=world,
            seconds=round(self._elapsed(), 3), finished=time.time(), summary=summary or {},
        )  # fmt: skip
        if is_first_rank():
            write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
            self._seconds_file.unlink(missing_ok=True)
        return manifest


class Metrics:
    """`metrics.jsonl`: one JSON object a line, each with its `step`. Written by rank 0, read by anyone."""

    def __init__(self, path: Path):
        self.path = path

    def log(self, step: int, **values: Any) -> None:
        """Append one row."""
        if not is_first_rank():
            return
        with explained(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rewind(self, step: int) -> None:
        """Forget rows after `step`, as a resumed run will write them again. A torn last line goes too."""
        if self.path.exists() and is_first_rank():
            kept = [row for row in self.read() if row["step"] <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def read(self) -> list[dict[str, Any]]:
        """All complete rows."""
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the writer was killed inside this line
        return rows


def version() -> str:
    """The installed version of bloomery."""
    return importlib.metadata.version("bloomery")


def key(stage: str, config: Config, digests: dict[str, str]) -> str:
    """Content key of a stage's product: stage, settings (run-only ones left out) and input digests."""
    identity = json.dumps([stage, configs.identity(config), digests], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def resolve(path: Path, kind: str) -> Path:
    """The folder of an input as given in a config, checked. `kind` is `model`, `dataset`, `tokenizer` or `raw`.

    A stage's folder stands for its product: `runs/tiny/sft` means `runs/tiny/sft/model` where a model is asked for.
    Foreign folders (a Hugging Face model, a folder of Parquet files) are taken as they are.
    """
    path = Path(path)
    if kind == "raw" and path.exists():
        return path
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such {'file or folder' if kind == 'raw' else f'folder; expected a {kind}'}")
    manifest = read_manifest(path, missing_ok=True)
    if manifest is None and (path / CONFIG).exists():
        raise ArtifactError(
            f"{path}: the stage that writes it has not finished; run it first (it resumes where it stopped)"
        )
    inner = path / MODEL if kind in ("model", "tokenizer") and (path / MODEL).is_dir() else path
    found = manifest.kind if manifest else None
    expected = {"dataset": DATASET_KINDS, "model": ("model",), "tokenizer": ("model", "tokenizer")}[kind]
    if found and found not in expected:
        raise ArtifactError(f"{path}: holds {found}, expected a {kind}")
    needed = {"model": "config.json", "tokenizer": "tokenizer.json"}.get(kind)
    if needed and not (inner / needed).is_file():
        raise ArtifactError(f"{inner}: no {needed} here; expected a {kind} in Hugging Face format")
    return inner


def read_manifest(path: Path, missing_ok: bool = False) -> Manifest | None:
    """The manifest in a stage's folder; `None` where there is none and `missing_ok`."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        if missing_ok:
            return None
        raise ArtifactError(f"{path}: no {MANIFEST}, so this is not a finished stage; run the stage that writes it")
    try:
        return Manifest.model_validate(read_json(file))
    except ValidationError as error:
        raise ArtifactError(f"{file}: not a manifest of this version: {error.errors()[0]['msg']}") from None


def read_state(path: Path) -> dict[str, Any]:
    """What a stage, finished or not, has said about itself: `stage`, `key`, `inputs` and, when cut, `seconds` so far.

    Empty when it was killed before it could say anything.
    """
    file = Path(path) / STATE
    state: dict[str, Any] = read_json(file) if file.is_file() else {}
    seconds = Path(path) / SECONDS
    return {**state, "seconds": float(seconds.read_text())} if seconds.is_file() else state


def require_kind(path: Path, *kinds: str) -> None:
    """Refuse a dataset folder whose manifest names another kind. A foreign folder has no kind and passes."""
    manifest = read_manifest(path, missing_ok=True)
    if manifest is not None and manifest.kind not in kinds:
        raise ArtifactError(f"{path}: holds {manifest.kind}, expected {' or '.join(kinds)}")


def digest(path: Path, kind: str) -> str:
    """Identity of an input: a finished stage's key, else a hash of names and contents.

    Raw input may be larger than one would read twice: there, sizes and times of change stand for the contents.
    """
    if kind == "raw":
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.blake2b(json.dumps(stats).encode(), digest_size=16).hexdigest()
    for folder in (path, path.parent):
        manifest = read_manifest(folder, missing_ok=True)
        if manifest is not None:
            return manifest.key
    hasher = hashlib.blake2b(digest_size=16)
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        hasher.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        hasher.update(file_digest(file).encode())
    return hasher.hexdigest()


def file_digest(path: Path) -> str:
    """blake2b-128 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read_json(path: Path) -> Any:
    """A JSON file; `ArtifactError` when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path}: damaged JSON ({error}); remove the file or its folder and run the stage again"
        ) from None


def write_json(path: Path, data: Any) -> None:
    """Atomically write readable JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomically write a small text file: the old content or the new one, never a torn file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path` (file or folder); it takes `path`'s place, synced, at the end.

    sync: off for what may be lost with the machine's power, as long as its reader can tell.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if sync:
                _sync(temporary)
            if temporary.is_dir() and path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an operating system's refusal to write (full disk, no permission) into an `ArtifactError`."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot write: {error.strerror or error}. What was finished before is kept; "
            "free space or change the output folder, then run the same command to continue"
        ) from error
