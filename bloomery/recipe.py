"""A recipe: stages by name, ordered by their `@name` references, each in its own process, finished ones skipped."""

import ctypes
import difflib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from bloomery import artifact
from bloomery import config as configs
from bloomery.artifact import Manifest, Output
from bloomery.config import Config
from bloomery.errors import ArtifactError, BloomeryError, ConfigError, PeerError
from bloomery.parallel.world import agreed, joined, leave, world
from bloomery.progress import say

STAGES = {
    "prepare": ("bloomery.data.prepare", "PrepareConfig"),
    "tokenizer": ("bloomery.data.tokenizer", "TokenizerConfig"),
    "blend": ("bloomery.data.blend", "BlendConfig"),
    "pretrain": ("bloomery.train.pretrain", "PretrainConfig"),
    "sft": ("bloomery.posttrain.sft", "SFTConfig"),
    "curate": ("bloomery.posttrain.curation", "CurateConfig"),
    "rl": ("bloomery.posttrain.rl", "RLConfig"),
    "evaluate": ("bloomery.evaluate.evaluate", "EvaluateConfig"),
    "export": ("bloomery.evaluate.export", "ExportConfig"),
}
_REFERENCE = re.compile(r"@([A-Za-z0-9_-]+)")
_RECIPE_KEYS = ("run", "seed", "needs", "stages")


@dataclass(frozen=True)
class Step:
    """One stage of a recipe, resolved. `needs`: inputs that nobody makes here, and how to get each."""

    name: str
    stage: str
    config: Config
    out: Path
    after: tuple[str, ...]
    needs: Mapping[Path, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """What it needs and is not there yet, each with the way to get it."""
        return [f"{path} is there ({how})" for path, how in self.needs.items() if not path.exists()]


def stage_module(stage: str) -> ModuleType:
    """The module that holds a stage's `run` and, where it has one, `check`."""
    if stage not in STAGES:
        raise ConfigError(_unknown("stage", stage, STAGES))
    return importlib.import_module(STAGES[stage][0])


def stage_config(stage: str) -> type[Config]:
    """The config class of a stage."""
    return getattr(stage_module(stage), STAGES[stage][1])


def _unknown(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"{name!r} is no {what}; " + (f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}")


def load(path: Path, overrides: Sequence[str] = (), run: Path | None = None) -> tuple[Path, list[Step]]:
    """Read a recipe: its run folder and its steps in the order in which they run.

    Overrides name a stage first (`base.loop.max_steps=50`) or a recipe key (`seed=1`). Raises `ConfigError`.
    """
    data = configs.read_yaml(path)
    for key in data.keys() - set(_RECIPE_KEYS):
        raise ConfigError(f"{path}: {_unknown('recipe key', key, _RECIPE_KEYS)}")
    stages = data.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise ConfigError(f"{path}: stages: found {stages!r}, expected a mapping of names to stages")
    needs = data.get("needs", {})
    if not isinstance(needs, dict) or not all(isinstance(how, str) for how in needs.values()):
        raise ConfigError(f"{path}: needs: found {needs!r}, expected paths, each with how to get what belongs there")
    data = configs.apply_overrides(data, [_rooted(override, stages) for override in overrides])
    folder = Path(run or data.get("run") or f"runs/{path.stem}")
    steps = [_step(name, body, folder, data) for name, body in data["stages"].items()]
    return folder, _ordered(steps)


def _rooted(override: str, stages: Mapping[str, Any]) -> str:
    first = override.partition("=")[0].split(".")[0]
    if first in _RECIPE_KEYS:
        return override
    if first not in stages:
        raise ConfigError(f"{override}: {_unknown('stage of this recipe', first, [*stages, *_RECIPE_KEYS])}")
    return f"stages.{override}"


def _step(name: str, body: Any, folder: Path, data: Mapping[str, Any]) -> Step:
    if not isinstance(body, dict):
        raise ConfigError(f"stages.{name}: found {body!r}, expected settings")
    settings = {key: value for key, value in body.items() if key != "stage"}
    stage = body.get("stage", name)
    try:
        cls = stage_config(stage)
    except ConfigError as error:
        raise ConfigError(f"stages.{name}.stage: {error}") from None
    if "seed" in cls.model_fields and "seed" in data:
        settings.setdefault("seed", data["seed"])
    references = tuple(dict.fromkeys(_references(settings)))
    for reference in references:
        if reference not in data["stages"]:
            raise ConfigError(
                f"stages.{name}: @{reference}: {_unknown('stage of this recipe', reference, data['stages'])}"
            )
    config = configs.build(cls, _resolved(settings, folder), where=name)
    used = [path for _, path in configs.inputs(config).values() if str(path) in data.get("needs", {})]
    return Step(name, stage, config, folder / name, references, {path: data["needs"][str(path)] for path in used})


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
        yield match[1]
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _references(item)


def _resolved(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return str(folder / match[1]) if (match := _REFERENCE.fullmatch(value)) else value
    if isinstance(value, Mapping):
        return {key: _resolved(item, folder) for key, item in value.items()}
    return [_resolved(item, folder) for item in value] if isinstance(value, list) else value


def _ordered(steps: list[Step]) -> list[Step]:
    """Dependencies first; otherwise the order of the file."""
    waiting, done, order = list(steps), set[str](), list[Step]()
    while waiting:
        ready = next((step for step in waiting if done.issuperset(step.after)), None)
        if ready is None:
            raise ConfigError(
                f"stages {', '.join(step.name for step in waiting)} wait for one another; break the circle"
            )
        waiting.remove(ready)
        done.add(ready.name)
        order.append(ready)
    return order


def run(folder: Path, steps: Sequence[Step]) -> list[Manifest]:
    """Run every step that is not done yet. Raises what the failing stage raised; what was finished stays.

    Under torchrun all ranks run the stages that train; the others run on rank 0 while the rest wait. Manifests are
    returned on rank 0 alone.
    """
    manifests = []
    for position, step in enumerate(steps, 1):
        if step.missing:
            raise ArtifactError(f"{step.name}: runs once {' and '.join(step.missing)}")
        before = not _left_to_do(step)
        if not before and (world().is_main or runs_on_all_ranks(step)):
            say(f"[{position}/{len(steps)}] {step.name} ({step.stage}){_where(step)}")
            run_stage(step)
        if world().is_main:
            manifest = artifact.read_manifest(step.out)
            assert manifest is not None
            took = "done before" if before else f"{manifest.seconds:.0f} s"
            say(f"[{position}/{len(steps)}] {step.name}: {took}  {headline(manifest)}")
            manifests.append(manifest)
    agreed("end", lambda: "reached")
    return manifests


def _left_to_do(step: Step) -> bool:
    """Rank 0 looks whether the step is done; all ranks must mean the same step."""

    def look() -> str:
        return "done" if Output(step.out, step.stage, step.config).done else configs.dump(step.config)

    found = agreed(f"step/{step.name}", look)
    if found != "done" and found != configs.dump(step.config):
        raise ConfigError(f"{step.name}.{_difference(configs.parse_yaml(found), step.config)}; give all ranks the same")
    return found != "done"


def _difference(first: dict[str, Any], own: Config) -> str:
    """The first setting that is not the same as on rank 0."""
    theirs, ours = configs.flatten(first), configs.flatten(own.model_dump(mode="json"))
    name = next(name for name in [*theirs, *ours] if theirs.get(name) != ours.get(name))
    return f"{name}: {ours.get(name)!r} on rank {world().rank}, {theirs.get(name)!r} on rank 0"


def runs_on_all_ranks(step: Step) -> bool:
    """Whether a stage is one that trains, and so can be spread over ranks."""
    return "parallel" in type(step.config).model_fields


def _where(step: Step) -> str:
    if world().size == 1:
        return ""
    return f" on {world().size} ranks" if runs_on_all_ranks(step) else " on rank 0"


def headline(manifest: Manifest) -> str:
    """The first few numbers of a summary, on one line."""
    numbers = {k: v for k, v in manifest.summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return "  ".join(
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in [*numbers.items()][:5]
    )


def run_stage(step: Step) -> None:
    """One stage in a process of its own, which dies with this one.

    On Linux it is a fork: imports are paid once for a whole recipe, and the parent holds no thread or device yet.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(step, sender, os.getpid()))
    child.start()
    sender.close()
    interrupted = _wait(child)
    if receiver.poll():
        with suppress(EOFError):  # the child ended without a word
            raise receiver.recv()
    if interrupted or child.exitcode == 130:
        raise KeyboardInterrupt
    if child.exitcode:
        how = f"by signal {-child.exitcode}" if child.exitcode < 0 else f"with exit code {child.exitcode}"
        hint = "; signal 9 is usually the system running out of memory" if child.exitcode == -9 else ""
        raise BloomeryError(f"{step.name}: the stage's process ended {how}{hint}. Run the same command to resume it")


def _wait(child: Any) -> bool:
    """Wait for the child through interrupts, as it saves its state first; True when there was one.

    The handlers only take note: an exception in the middle of the wait could lose the child's exit code.
    """
    interrupts: list[int] = []

    def note(number: int, _: Any) -> None:
        interrupts.append(number)
        if number == signal.SIGTERM or world().size > 1:
            os.kill(child.pid, number)  # a terminal sends its interrupt to both, a scheduler only to us

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child.join()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return bool(interrupts)


def die_with(parent: int) -> None:
    """Have this process killed when `parent`, which started it, ends: it never goes on as an orphan. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _child(step: Step, sender: multiprocessing.connection.Connection, parent: int) -> None:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if world().size > 1:
        os.setpgid(0, 0)  # torchrun signals the whole group; one request must not arrive twice
    try:
        with _joined(step):
            stage_module(step.stage).run(step.config, step.out)
    except BloomeryError as error:
        sender.send(type(error)(f"{step.name}: {error}"))
        if isinstance(error, PeerError):
            os._exit(error.exit_code)  # a thread may still wait for the rank that is gone
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _joined(step: Step) -> AbstractContextManager[Any]:
    if not runs_on_all_ranks(step):
        leave()
        return nullcontext()
    return joined(step.name, step.config.parallel.timeout_seconds)  # type: ignore[attr-defined]


def check(steps: Sequence[Step]) -> dict[str, dict[str, Any]]:
    """What each stage can say before it runs: sizes, memory, tokens, the first batch. Nothing is written.

    Raises `ArtifactError` for an input that neither exists nor comes from an earlier stage; what the recipe `needs`
    from outside may be missing, and the finding says so.
    """
    names = {step.out: step.name for step in steps}
    return {step.name: _check(step, names) for step in steps}


def _check(step: Step, names: Mapping[Path, str]) -> dict[str, Any]:
    makers = []
    for name, (kind, path) in configs.inputs(step.config).items():
        if path in names:
            makers += [names[path]] if artifact.read_manifest(path, missing_ok=True) is None else []
        elif path.exists() or path not in step.needs:
            with _named(f"{step.name}.{name}"):
                artifact.resolve(path, kind)
    module = stage_module(step.stage)
    with _named(step.name):
        found = {"stage": step.stage, **(module.check(step.config) if hasattr(module, "check") else {})}
    waits = [f"{', '.join(dict.fromkeys(makers))} has run"] * bool(makers) + step.missing
    return found | {"inputs": f"more is known once {' and '.join(waits)}"} if waits else found


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except BloomeryError as error:
        raise type(error)(f"{where}: {error}") from None
