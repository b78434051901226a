"""What training through the parallel path costs where there is nothing to share.

`parallel/overhead`: optimizer steps of one process that was spread over a mapping of one rank, against the plain loop:
same weights, same batches, one thread, CPU seconds, in turns. Tokens per second; 1 means that it costs nothing, and
0.97 is the least that is accepted.

`python -m bench.parallel [--quick]` prints one JSON line.
"""

import argparse
import itertools
import json
from collections.abc import Callable

import torch

from bench.figure import take_turns
from bench.train import MODELS, SIZES
from bloomery.model.decoder import Decoder
from bloomery.parallel.apply import parallelize
from bloomery.parallel.mapping import Mapping
from bloomery.train.loop import LoopConfig, TrainState, steps
from bloomery.train.losses import next_token
from bloomery.train.optim import adamw

BATCH, MICRO, SEQ = 16, 8, 128
STEPS = 3  # of one turn


def training(mapping: Mapping | None) -> Callable[[], None]:
    """A few optimizer steps a call, always of the same model and batches."""
    torch.manual_seed(0)
    model = Decoder(MODELS["train/hybrid"])
    parallel = parallelize(model, mapping) if mapping else None
    loop = LoopConfig(max_steps=1_000_000, batch_size=BATCH, micro_batch_size=MICRO, precision="fp32")
    state = TrainState(model, adamw(model, loop), parallel=parallel)
    tokens = torch.randint(0, SIZES["vocab_size"], (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part[:, :-1], "labels": part[:, 1:]} for part in tokens.split(MICRO)]
    taken = steps(state, itertools.repeat(batches), next_token, loop)

    def turn() -> None:
        for _ in range(STEPS):
            next(taken)

    return turn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    repeats = 5 if parser.parse_args().quick else 15
    torch.set_num_threads(1)
    found = take_turns(
        "parallel/overhead", training(Mapping()), training(None), STEPS * BATCH * SEQ, "tokens/s", repeats
    )
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
