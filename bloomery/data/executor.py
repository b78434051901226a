"""Where the parts of `prepare` are worked on: processes of this machine, or a cluster through datatrove.

Every part that is done is a file on disk, so a run that was cut goes on with the others, wherever they are run.
"""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from bloomery.config import Config, Field
from bloomery.data.pieces import PART_BYTES
from bloomery.errors import ArtifactError, ConfigError

if TYPE_CHECKING:  # these two need the stage's settings, which hold ours
    from bloomery.data.part import Job, Worker
    from bloomery.data.prepare_config import PrepareConfig

LOGS = "datatrove"
_AHEAD = 2
_POLL_SECONDS = 10.0
_BYTES_WORTH_A_PROCESS = 2 * PART_BYTES


class SlurmConfig(Config):
    """What `sbatch` is told."""

    partition: str = Field(description="partition of the jobs")
    time: str = Field(default="24:00:00", description="longest time of a task, hours:minutes:seconds")
    qos: str = Field(default="normal", description="quality of service; empty: the cluster's default")
    env_command: str | None = Field(default=None, description="shell command that makes bloomery available in a job")
    sbatch_args: dict[str, str] = Field(default={}, description="further options of sbatch, such as account: name")


class ExecutorConfig(Config):
    """Where the work is done."""

    type: Literal["local", "slurm", "ray"] = Field(
        default="local", description="processes of this machine, or a cluster through datatrove (extra `data`)"
    )
    workers: int | None = Field(
        default=None,
        description="processes, or cluster tasks at a time; a process a core, or one for little input, where not given",
        gt=0,
    )
    tasks: int = Field(default=100, description="cluster tasks; each works on every tasks-th part", gt=0)
    cpus_per_task: int = Field(default=1, description="cores of a cluster task", gt=0)
    memory_gb_per_cpu: int = Field(default=4, description="memory of a cluster task for each core, in GB", gt=0)
    slurm: SlurmConfig | None = Field(default=None, description="what sbatch is told (slurm)")


def check(config: ExecutorConfig) -> None:
    """Raises `ConfigError` for settings that lack something or have no effect, and where datatrove is missing."""
    if (config.type == "slurm") != (config.slurm is not None):
        raise ConfigError(
            "executor.slurm: missing; name at least its partition"
            if config.type == "slurm"
            else f"executor.slurm: has no effect with executor.type {config.type}; remove it"
        )
    if config.type != "local":
        _datatrove()
        _require_ray(config)
    elif {"tasks", "cpus_per_task", "memory_gb_per_cpu"} & config.model_fields_set - _defaults(config):
        raise ConfigError("executor: tasks, cpus_per_task and memory_gb_per_cpu are for clusters; remove them")


def _defaults(config: ExecutorConfig) -> set[str]:
    """Fields whose value is the default one, though it may have been written down."""
    return {name for name, field in type(config).model_fields.items() if getattr(config, name) == field.default}


class Runner(Protocol):
    """Works on jobs and gives each back when it is done, in the order given."""

    def run(self, jobs: Sequence["Job"]) -> Iterator["Job"]:
        """Closing the iterator early leaves the rest undone."""


def num_processes(config: ExecutorConfig, parts: int, input_bytes: int) -> int:
    """Processes of this machine that are worth starting."""
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, parts) if input_bytes > _BYTES_WORTH_A_PROCESS else 1


class InProcess:
    """One part after another, in this process."""

    def __init__(self, make: Callable[[], "Worker"]):
        self._make = make
        self._worker: Worker | None = None

    def run(self, jobs: Sequence["Job"]) -> Iterator["Job"]:
        """Each part is worked on when it is asked for."""
        for job in jobs:
            if not job.done:
                self._worker = self._worker or self._make()
                self._worker.run(job)
            yield job

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass


_worker: "Worker | None" = None


def _begin(make: Callable[[], "Worker"]) -> None:
    """First thing in a process: it leaves interrupts to the parent, ends when that ends, and loads what parts share."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = make()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: "Job") -> None:
    assert _worker is not None
    _worker.run(job)


class Processes:
    """Parts side by side in processes of this machine, a few ahead of the one that is asked for."""

    def __init__(self, make: Callable[[], "Worker"], count: int):
        self._ahead = count * _AHEAD
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of Arrow
        self._pool = ProcessPoolExecutor(count, context, _begin, (make,))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        for process in processes if kind is not None else ():
            process.terminate()  # what they were at is begun anew: a part counts when its file is complete

    def run(self, jobs: Sequence["Job"]) -> Iterator["Job"]:
        """Raises what a part raised, and `ArtifactError` when a process was killed."""
        waiting: deque[tuple[Job, Future[None] | None]] = deque()
        remaining = iter(jobs)
        try:
            while True:
                while len(waiting) <= self._ahead and (job := next(remaining, None)) is not None:
                    waiting.append((job, None if job.done else self._pool.submit(_work, job)))
                if not waiting:
                    return
                job, future = waiting.popleft()
                if future is not None:
                    future.result()
                yield job
        except BrokenProcessPool:
            raise ArtifactError(
                "a process was killed, usually because memory ran out. Parts that are done are kept; "
                "run the same command to go on, with fewer executor.workers or smaller part_bytes"
            ) from None
        finally:
            for _, future in waiting:
                if future is not None:
                    future.cancel()


class ClusterTask:
    """What one cluster task does: every `tasks`-th part that is not done. datatrove pickles it and calls it by rank."""

    def __init__(self, config: "PrepareConfig", out: Path, jobs: Sequence["Job"]):
        self.config, self.out, self.jobs = config, out, jobs

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        from bloomery.data.part import Worker

        mine = [job for job in self.jobs[rank::world_size] if not job.done]
        if mine:
            worker = Worker(self.config, self.out)
            for job in mine:
                worker.run(job)


def run_on_cluster(config: "PrepareConfig", out: Path, jobs: Sequence["Job"]) -> None:
    """Submit what is not done, and wait for it. Raises `ArtifactError` when the cluster leaves parts undone."""
    missing = [job for job in jobs if not job.done]
    if not missing:
        return
    executor = _executor(
        config.executor, ClusterTask(config, out, missing), min(config.executor.tasks, len(missing)), out
    )
    executor.run()
    if config.executor.type == "slurm":
        _wait_for_slurm(str(executor.job_id), missing)
    if undone := [job for job in missing if not job.done]:
        raise ArtifactError(
            f"{out}: the cluster left {len(undone)} of {len(missing)} parts undone; its logs are in {out / LOGS}. "
            "Run the same command to submit those again"
        )


def _executor(config: ExecutorConfig, task: ClusterTask, tasks: int, out: Path) -> Any:
    """datatrove's executor. Its own record of finished tasks is not used: our files say what is done."""
    executors = _datatrove()
    common = {
        "pipeline": [task], "tasks": tasks, "workers": config.workers or -1, "logging_dir": str((out / LOGS).resolve()),
        "skip_completed": False, "cpus_per_task": config.cpus_per_task, "mem_per_cpu_gb": config.memory_gb_per_cpu,
    }  # fmt: skip
    if config.type == "ray":
        return executors.RayPipelineExecutor(**common)
    assert config.slurm is not None
    slurm = config.slurm
    return executors.SlurmPipelineExecutor(
        **common, partition=slurm.partition, time=slurm.time, qos=slurm.qos, env_command=slurm.env_command,
        sbatch_args=slurm.sbatch_args, job_name="bloomery-prepare",
    )  # fmt: skip


def _wait_for_slurm(job: str, jobs: Sequence["Job"]) -> None:
    """Until all is done, or Slurm knows the job no longer."""
    while not all(each.done for each in jobs):
        listed = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
        if listed.returncode or not listed.stdout.strip():
            return
        time.sleep(_POLL_SECONDS)


def _require_ray(config: ExecutorConfig) -> None:
    if config.type == "ray":
        try:
            import ray  # noqa: F401
        except ImportError:
            raise ConfigError("executor.type: ray is not installed; pip install 'bloomery[data,ray]'") from None


def _datatrove() -> Any:
    try:
        from datatrove import executor
    except ImportError:
        raise ConfigError(
            "executor.type: Slurm and Ray are reached through datatrove, which is not installed; "
            "pip install 'bloomery[data]'"
        ) from None
    return executor
