"""Which sequence comes next: draws from a plan, against the ways in which others draw from a blend.

A thousand sources, 1.8e9 sequences (15T tokens in rows of 8,192), shares from a Dirichlet distribution. A draw is a
source and the number within it, on both sides; time is that of one core.

`sampler/draws`: a window of 524,288 draws in the middle of the plan. Peer: as many draws by Megatron-Core's
`build_blending_indices` (C++; each takes the source that is furthest behind), which can only begin at the first.
`sampler/interleave`: the same beside `datasets.interleave_datasets` with probabilities, over ten sources.
`sampler/plan`: plans of two phases and a ramp with all that the first draw needs, per second. Peer: one a second.
`sampler/loader`: tokens a second of batches of 32 rows of 128 tokens from six sources. Peer: what forward and backward
passes of the model of recipes/tiny.yaml consume.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from bench.figure import figure, take_turns
from bench.peers import VENV
from bloomery import recipe
from bloomery.artifact import DATA, write_json
from bloomery.data.blended import PLAN, BlendedRows
from bloomery.data.plan import Plan, make_plan
from bloomery.data.tokens import RowWriter, shard
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.train.losses import next_token

SOURCES, SEQUENCES, WINDOW = 1000, 15_000_000_000_000 // 8192, 2**19
PEER = "megatron-core==0.16.1"


def shares(count: int, seed: int = 0) -> np.ndarray:
    """Shares of sources, unequal."""
    return np.random.default_rng(seed).dirichlet(np.ones(count))


def two_phases(count: int, sequences: int, rows: int = 10**6) -> Plan:
    """A plan of two phases with a ramp between them."""
    names = [f"source-{number}" for number in range(count)]
    first, second = (dict(zip(names, shares(count, seed).tolist(), strict=True)) for seed in (0, 1))
    return make_plan(names, [rows] * count, [1.0] * count, [(0.6, first), (0.4, second, 0.1)], sequences, 0)


def megatron() -> ModuleType:
    """The compiled helpers of Megatron-Core, without the package around them, which needs a GPU's libraries."""
    folder = VENV / PEER
    if not folder.is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PEER]
        subprocess.run(install, check=True, stdout=sys.stderr)
    [library] = (folder / "megatron" / "core" / "datasets").glob("helpers_cpp*.so")
    spec = importlib.util.spec_from_file_location("helpers_cpp", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def greedy(count: int) -> Callable[[], object]:
    """Megatron-Core's index of `count` draws."""
    helpers, weights = megatron(), shares(SOURCES)

    def run() -> None:
        source, number = np.zeros(count, dtype=np.int16), np.zeros(count, dtype=np.int64)
        helpers.build_blending_indices(source, number, weights, SOURCES, count, False)

    return run


def interleaved(count: int) -> Callable[[], object]:
    """`datasets.interleave_datasets` of ten sources of `count` rows in all."""
    import datasets

    rows = [max(1, round(share * count)) for share in shares(10)]
    parts = [datasets.Dataset.from_dict({"row": range(number)}) for number in rows]
    return lambda: datasets.interleave_datasets(
        parts, probabilities=shares(10).tolist(), seed=0, stopping_strategy="all_exhausted"
    )


def draws(repeats: int) -> Iterator[dict[str, object]]:
    """Ours and the two peers."""
    many, few, middle = two_phases(SOURCES, SEQUENCES), two_phases(10, SEQUENCES), SEQUENCES // 3
    yield take_turns(
        "sampler/draws", lambda: many.order(middle, middle + WINDOW), greedy(WINDOW), WINDOW, "draws/s", repeats
    )
    window = WINDOW // 8
    yield take_turns(
        "sampler/interleave",
        lambda: few.order(middle, middle + window),
        interleaved(window),
        window,
        "draws/s",
        repeats,
    )


def plans(repeats: int) -> dict[str, object]:
    """From weights to the first draws of both phases."""

    def run() -> None:
        plan = two_phases(SOURCES, SEQUENCES)
        plan.order(0, 32)
        plan.order(SEQUENCES - 32, SEQUENCES)

    def a_second() -> None:
        end = time.process_time() + 1
        while time.process_time() < end:
            pass

    return take_turns("sampler/plan", run, a_second, 1, "plans/s", repeats)


def loader(repeats: int, folder: Path) -> dict[str, object]:
    """Batches of rows on disk, and the steps that consume them."""
    plan = two_phases(6, 100_000, rows=400)
    draw = np.random.default_rng(0)
    for name in plan.sources:
        with RowWriter(shard(folder / DATA, name), 129, "concatenated", 0) as writer:
            writer.add(draw.integers(0, 512, 400 * 128 + 1).astype(np.int32))
    write_json(folder / PLAN, {**plan.to_json(), "seq_len": 128, "vocab_size": 512})
    rows, batches = BlendedRows(folder), 500
    [config] = [step.config for step in recipe.load(Path("recipes/tiny.yaml"))[1] if step.name == "base"]
    model = Decoder(ModelConfig(**config.model.model_dump()))  # type: ignore[attr-defined]
    batch = rows.batch(0, 32)
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(repeats + 1):
        start = time.process_time()
        for place in range(repeat * batches, (repeat + 1) * batches):
            rows.batch(place * 32, (place + 1) * 32)
        middle = time.process_time()
        next_token(model, batch, rows.names).sum.backward()
        end = time.process_time()
        if repeat:  # the first is warm-up
            rates["ours"].append(batches * 32 * 128 / (middle - start))
            rates["peer"].append(32 * 128 / (end - middle))
    return figure("sampler/loader", rates["ours"], rates["peer"], "tokens/s")


def main() -> None:
    """One JSON line a figure."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="two turns instead of five")
    repeats = 2 if arguments.parse_args().quick else 5
    torch.set_num_threads(1)
    for found in draws(repeats):
        print(json.dumps(found), flush=True)
    print(json.dumps(plans(repeats)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(loader(repeats, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
