"""A launcher in miniature: starts ranks, kills one at a random moment, starts others in their place, until all is done.

A program, so that imports are paid once and ranks are forked from a process that holds no thread of torch's:
`python chaos.py FOLDER STEPS KILLS SEED` prints one line of JSON for each time the ranks were started.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from exact_training import in_float64, next_token_exact
from spread_training import LOOP, MAPPINGS, Rows, new_state

from bloomery import artifact
from bloomery.artifact import Output
from bloomery.config import RUN_ONLY, Config, Field
from bloomery.errors import PeerError
from bloomery.parallel.settings import ParallelConfig
from bloomery.parallel.world import joined
from bloomery.recipe import die_with
from bloomery.train.loop import LoopConfig
from bloomery.train.run import resumable
from bloomery.train.spread import row_batches

TIMEOUT_SECONDS, PATIENCE_SECONDS = 60.0, 3.0
LOST_A_PEER = 7
ROUTE = [name for name, (ranks, _) in MAPPINGS.items() if ranks > 1]


class ChaosConfig(Config):
    """Settings of the stage below."""

    loop: LoopConfig = Field(description="how to train")
    parallel: ParallelConfig = Field(json_schema_extra=RUN_ONLY, description="how the work is spread over ranks")


def stage(path: Path, steps: int, degrees: dict[str, Any]) -> None:
    """Train to the end, as the stages do."""
    loop = LOOP.model_copy(update={"max_steps": steps})
    with Output(path, "chaos", ChaosConfig(loop=loop, parallel=ParallelConfig(**degrees))) as output, in_float64():
        state, rows = new_state(degrees), Rows()
        for _ in resumable(
            output, state, lambda place: row_batches(rows, place, loop, state.parallel), next_token_exact, loop
        ):
            pass
        output.finish("model")


def one_rank(rank: int, ranks: int, attempt: int, port: int, path: Path, steps: int, degrees: dict[str, Any]) -> None:
    die_with(os.getppid())
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), TORCHELASTIC_RESTART_COUNT=str(attempt),
        MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    try:
        with joined("chaos", TIMEOUT_SECONDS):
            stage(path, steps, degrees)
    except PeerError:
        os._exit(LOST_A_PEER)


def reached(path: Path) -> int:
    return max((row["step"] for row in artifact.Metrics(path / artifact.METRICS).read()), default=0)


def _end(processes: list[Any], patience: float) -> None:
    """Ranks that miss one end by themselves; those still meeting, at the start, are asked to, as torchrun does."""
    deadline = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.terminate()
        process.join(2 * TIMEOUT_SECONDS)


def main(path: Path, steps: int, kills: int, seed: int) -> None:
    draw, context = random.Random(seed), multiprocessing.get_context("fork")
    for attempt in range(kills + 1):
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        name = ROUTE[attempt % len(ROUTE)]
        ranks, degrees = MAPPINGS[name]
        processes = [
            context.Process(target=one_rank, args=(rank, ranks, attempt, store.port, path, steps, degrees))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        victim, wanted = draw.randrange(ranks), reached(path) + draw.randint(0, 4)
        if attempt < kills:
            while reached(path) < wanted and all(process.is_alive() for process in processes):
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.1))
            processes[victim].kill()
        started = time.monotonic()
        _end(processes, patience=PATIENCE_SECONDS if attempt < kills else 30 * PATIENCE_SECONDS)
        codes = [process.exitcode for process in processes]
        hit = codes[victim] == -signal.SIGKILL
        found = {"mapping": name, "victim": victim if hit else None, "codes": codes, "step": reached(path)}
        sys.stdout.write(json.dumps(found | {"seconds": time.monotonic() - started}) + "\n")
        sys.stdout.flush()
        if any(code not in (0, LOST_A_PEER, -signal.SIGKILL, -signal.SIGTERM) for code in codes):
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
