"""Stage `prepare`: raw sources into a dataset folder of documents, messages or prompts."""

import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.data import executor, quality
from bloomery.data.dataset import write_card
from bloomery.data.merge import Merge
from bloomery.data.part import WORK, Job, Worker, calibration_texts
from bloomery.data.pieces import Piece
from bloomery.data.prepare_config import PrepareConfig, check
from bloomery.data.table import drops_table
from bloomery.progress import Bar, say

CONTAMINATION = "contamination.json"
"""File in the folder: which documents hold which benchmark item."""

__all__ = ["CONTAMINATION", "PrepareConfig", "check", "run"]


def run(config: PrepareConfig, out: Path) -> Manifest:
    """Stage `prepare`: Parquet shards by source; the manifest says how many were kept and why others were not.

    A run that was cut goes on with the parts that are not done, and gives the same as one that was not.
    """
    check(config)
    executor.check(config.executor)
    with Output(out, "prepare", config) as output:
        if not output.done:
            return _prepare(config, output)
        return artifact.read_manifest(output.path)  # type: ignore[return-value]


def _prepare(config: PrepareConfig, output: Output) -> Manifest:
    jobs = _jobs(config, output.path)
    everything = [job for each in jobs for job in each]
    if config.quality is not None and config.quality.trained is None:
        _train_quality(config, output.path, everything)
    if config.executor.type != "local":
        say(f"prepare  {len(everything):,} parts, by {config.executor.type}")
        executor.run_on_cluster(config, output.path, everything)
    shutil.rmtree(output.data, ignore_errors=True)
    merge, sources = Merge(config, output.path), dict[str, dict[str, Any]]()
    with _runner(config, output.path, everything) as runner, Bar(f"prepare {config.kind}", len(everything)) as bar:
        tiers, done = _tiers(config, output.path), 0
        for number, source in enumerate(config.sources):
            progress = _moving(bar, done, len(jobs[number]), source.name, runner.run(jobs[number]))
            sources[source.name] = merge.source(number, tiers if source.name in config.tiered else (), progress)
            done += len(jobs[number])
            bar.update(done, source.name)
    write_card(output.path, {"train": f"{artifact.DATA}/*.parquet"})
    say("\n" + drops_table(sources))
    summary = _summary(config, output.path, merge, sources)
    manifest = output.finish(config.kind, summary)
    shutil.rmtree(output.path / WORK, ignore_errors=True)
    return manifest


def _jobs(config: PrepareConfig, out: Path) -> list[list[Job]]:
    """The parts of each source."""
    jobs = []
    for number, source in enumerate(config.sources):
        folder = (out / WORK / f"{number}-{source.name}").resolve()
        parts = enumerate(source.parts(config.part_bytes))
        jobs.append([Job(number, index, part, folder / f"{index:06d}.parquet") for index, part in parts])
    return jobs


def _train_quality(config: PrepareConfig, out: Path, jobs: list[Job]) -> None:
    assert config.quality is not None
    folder = out / quality.FOLDER
    if not quality.is_saved(folder):
        say("prepare  learning quality from the examples")
        quality.train(config.quality, calibration_texts(config, jobs), folder)


def _runner(config: PrepareConfig, out: Path, jobs: Sequence[Job]) -> AbstractContextManager[Any]:
    count = executor.num_processes(config.executor, len(jobs), sum(map(_bytes, jobs)))
    count = min(count, sum(not job.done for job in jobs)) if config.executor.type == "local" else 1
    make = partial(Worker, config, out)
    return executor.Processes(make, count) if count > 1 else executor.InProcess(make)


def _bytes(job: Job) -> int:
    """Input of a part that is a stretch of files; 0 where that is unknown."""
    pieces = job.part if isinstance(job.part, tuple) else ()
    return sum(piece.size for piece in pieces if isinstance(piece, Piece))


def _moving(bar: Bar, done: int, total: int, name: str, jobs: Iterator[Job]) -> Iterator[Job]:
    """Passes parts on and moves the bar."""
    for number, job in enumerate(jobs, 1):
        yield job
        if number < total:
            bar.update(done + number, name)


def _tiers(config: PrepareConfig, out: Path) -> Sequence[str]:
    if config.quality is None:
        return ()
    return quality.load(config.quality.trained or out / quality.FOLDER)[0].tiers


def _summary(config: PrepareConfig, out: Path, merge: Merge, sources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says: counts by raw source, and the inventory of what a blend can weight."""
    documents = sum(each["kept"] for each in sources.values())
    summary = {"documents": documents, "sources": sources, "inventory": merge.inventory}
    summary["python"] = platform.python_version()
    if config.quality is not None:
        facts = quality.load(config.quality.trained or out / quality.FOLDER)[1]
        summary["calibration"] = facts.pop("calibration")
        summary["quality"] = {name: facts[name] for name in facts if name not in ("tiers", "threshold_of_each")}
    if config.decontaminate is not None:
        artifact.write_json(out / CONTAMINATION, merge.hits)
        summary["renumbered"] = sum(hit["masked"] for hit in merge.hits)
    return summary
