"""Measuring cells: each in a fresh process with one thread, its result kept, so that an interrupted claim goes on.

`python -m bloomery.claim NAME ARM SEED FILE full|smoke PARENT` measures one; the claim's run starts these.
"""

import os
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from bloomery import artifact
from bloomery.claim import source
from bloomery.claim.claim import Claim
from bloomery.errors import BloomeryError
from bloomery.progress import Bar
from bloomery.recipe import die_with

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
Cell = tuple[str, int]


def measure_all(claim: Claim, root: Path, folder: Path, smoke: bool) -> dict[Cell, dict]:
    """Every cell's record `{"arm", "seed", "result", "seconds", "commit"}`; those in `folder` are not measured again.

    Raises `BloomeryError` when a cell fails; what the others found is kept.
    """
    seeds = claim.smoke_seeds if smoke else claim.seeds
    files = {(arm, seed): folder / f"{arm}-{seed}.json" for seed in seeds for arm in claim.arms}
    waiting = [cell for cell, file in files.items() if not file.exists()]
    if waiting:
        _measure(claim, waiting, files, root, smoke)
    return {cell: artifact.read_json(file) for cell, file in files.items()}


def _measure(claim: Claim, waiting: list[Cell], files: dict[Cell, Path], root: Path, smoke: bool) -> None:
    running: dict[Cell, subprocess.Popen] = {}
    try:
        with Bar(f"claim {claim.name}", len(files)) as bar:
            bar.update(len(files) - len(waiting))
            while waiting or running:
                while len(running) < claim.workers and (cell := _next(claim, waiting, running)):
                    waiting.remove(cell)
                    running[cell] = _start(claim.name, cell, files[cell], root, smoke)
                time.sleep(0.05)
                for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                    _check(claim.name, cell, running.pop(cell))
                    bar.update(len(files) - len(waiting) - len(running), f"{cell[0]} {cell[1]} done")
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _next(claim: Claim, waiting: list[Cell], running: Collection[Cell]) -> Cell | None:
    """The first cell whose predecessor is measured."""
    return next((c for c in waiting if (claim.after.get(c[0]), c[1]) not in {*waiting, *running}), None)


def _start(name: str, cell: Cell, file: Path, root: Path, smoke: bool) -> subprocess.Popen:
    command = [sys.executable, "-m", "bloomery.claim", name, cell[0], str(cell[1]), str(file.absolute())]
    command += ["smoke" if smoke else "full", str(os.getpid())]
    return subprocess.Popen(command, cwd=root, env=os.environ | ONE_THREAD)


def _check(name: str, cell: Cell, process: subprocess.Popen) -> None:
    if process.returncode:
        raise BloomeryError(
            f"claim {name}: arm {cell[0]}, seed {cell[1]} ended with exit code {process.returncode}; what it said is "
            "above. Cells that were finished are kept: run the same command to go on"
        )


def measure(name: str, arm: str, seed: int, file: Path, smoke: bool) -> None:
    """One cell, written to `file`."""
    root = Path.cwd()
    commit = _commit(root)
    claim = source.load(name, root)
    file.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    result = claim.measure(arm, seed, smoke, *([file.parent] if claim.after else []))
    record = {"arm": arm, "seed": seed, "result": result, "seconds": round(time.monotonic() - started, 2)}
    artifact.write_json(file, record | {"commit": commit})


def _commit(root: Path) -> str:
    """The checkout's commit, with `-dirty` where tracked files differ from it; empty outside git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def main(name: str, arm: str, seed: str, file: str, size: str, parent: str) -> None:
    """The process of one cell, from its command line."""
    die_with(int(parent))
    try:
        measure(name, arm, int(seed), Path(file), size == "smoke")
    except BloomeryError as error:
        print(f"bloomery: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
