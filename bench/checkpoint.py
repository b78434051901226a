"""What a checkpoint costs the training it interrupts, at 100 million parameters, in wall time; needs an idle machine.

`checkpoint/step_with_save`: steps per hour where each begins with a save (the copy, then the write in the background
while the step runs); the peer is the same step without one. 1 − ratio is the share of a step that a checkpoint costs.

`checkpoint/standstill`: saves per minute of standstill, that is until training may go on, against torch's own
`dcp.async_save` of the same state, with its writer as it comes.

`python -m bench.checkpoint [--quick]` prints one JSON line per figure; a ratio above 1 means we are faster.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from bench.figure import figure
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.train.checkpoint import Checkpoints
from bloomery.train.loop import LoopConfig, TrainState, steps
from bloomery.train.losses import next_token
from bloomery.train.optim import adamw

MODEL = ModelConfig(
    family="llama", pattern="*-" * 12, mlp_gated=True, mlp_hidden_act="silu", rope=RopeConfig(), vocab_size=8192,
    hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=12, head_dim=64,
)  # fmt: skip
QUICK = MODEL.model_copy(update={"pattern": "*-", "vocab_size": 512, "intermediate_size": 256})
ROWS, SEQ = 4, 256
REPEATS = 3


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def measure(config: ModelConfig, folder: Path) -> list[dict[str, object]]:
    loop = LoopConfig(max_steps=10**6, batch_size=ROWS, precision="fp32")
    model = Decoder(config)
    state = TrainState(model, adamw(model, loop))
    ids = torch.randint(config.vocab_size, (ROWS, SEQ + 1))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    run = steps(state, iter(lambda: [batch], None), next_token, loop)
    next(run)
    saved, plain, ours, peer = [], [], [], []
    with Checkpoints(folder / "ours") as checkpoints:
        for repeat in range(REPEATS + 1):
            plain.append(3600 / seconds(lambda: next(run)))
            start = time.perf_counter()
            ours.append(60 / seconds(lambda: checkpoints.save(state)))
            next(run)
            saved.append(3600 / (time.perf_counter() - start))
            checkpoints.wait()
            peer.append(60 / torch_standstill(state, folder / f"torch-{repeat}"))
    return [  # the first turn warms up
        figure("checkpoint/step_with_save", saved[1:], plain[1:], "steps/hour"),
        figure("checkpoint/standstill", ours[1:], peer[1:], "saves/minute of standstill"),
    ]


def torch_standstill(state: TrainState, folder: Path) -> float:
    """Until `dcp.async_save` returns; the write is waited for outside of the time."""
    weights, optimizer = get_state_dict(state.model, state.optimizer)
    start = time.perf_counter()
    future = dcp.async_save({"model": weights, "optimizer": optimizer}, checkpoint_id=folder, no_dist=True)
    taken = time.perf_counter() - start
    future.result()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small model: checks that it runs")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(QUICK if quick else MODEL, Path(folder)):
            sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
