"""Decoding of a hybrid against the Transformer of the same size, over batch × context.

The hybrid has 26 layers (12 Mamba-2, 2 attention, 12 MLP) and 19.3 M parameters; its peer is what
`matched_transformer` gives for 16 blocks, 19.1 M. Width 256, vocabulary 8,192, 8 query heads and 4 key heads of 32, no
positions, random weights, float32, one thread. Both run the same `Step`, in turns, over preallocated caches whose keys
are read where they lie: never copied, never repeated for the query heads.
No prompt is read: caches are filled with random numbers and said to hold that many tokens, which costs a step the same.
`python -m bench.decode [--quick]` prints one JSON line per figure: tokens per second, `ratio` with its bootstrap 95 %
interval `ci` over the turns, and `predicted`, the ratio of the bytes that a step must move. The last one,
`decode/hybrid_65536`, is the smallest ratio of the cells with 65,536 cached tokens or more.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import fields

import torch

from bench.figure import figure
from bloomery.evaluate.statistics import Difference, two_level_bootstrap
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.model.matched import matched_transformer
from bloomery.model.roofline import predicted_ratio
from bloomery.model.state import DecodeState
from bloomery.model.step import Step

HYBRID = ModelConfig(
    pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-", vocab_size=8192, hidden_size=256, intermediate_size=1344,
    num_attention_heads=8, num_key_value_heads=4, head_dim=32,
    mamba_num_heads=16, mamba_head_dim=32, n_groups=4, ssm_state_size=64,
)  # fmt: skip
TRANSFORMER = matched_transformer(HYBRID, blocks=16)
GRID = ((1, 512), (1, 4096), (4, 4096), (4, 16384), (1, 65536), (8, 8192))
"""Sequences × tokens that each of them holds."""
LONG = 65536
"""Cached tokens (batch × context) from which the hybrid must be three times as fast."""


class Decoding:
    """A model that decodes `batch` sequences which hold `tokens` random tokens each, one step after the other."""

    def __init__(self, model: Decoder, batch: int, tokens: int, steps: int):
        self.tokens, self.steps = tokens, steps
        self.state = DecodeState.allocate(model.config, batch, tokens + steps)
        fill(self.state)
        self._step = Step(model)

    def seconds(self) -> float:
        """CPU time of one step: the median of `steps`, from `tokens` held tokens on."""
        self.state.lengths.fill_(self.tokens)
        tokens = torch.zeros(self.state.batch, 1, dtype=torch.int64)
        times = []
        for _ in range(self.steps):
            start = time.process_time()
            tokens = self._step(tokens, self.state).argmax(-1, keepdim=True)
            times.append(time.process_time() - start)
        return statistics.median(times)


def fill(state: DecodeState) -> None:
    """Random numbers everywhere; those of one attention layer are drawn and copied to the others."""
    drawn: dict[str, torch.Tensor] = {}
    for cache in state.layers:
        for field in fields(cache) if cache is not None else ():
            buffer = getattr(cache, field.name)
            if field.name not in drawn:
                drawn[field.name] = buffer.normal_()
            else:
                buffer.copy_(drawn[field.name])


def turns(ours: Decoding, peer: Decoding, repeats: int) -> list[tuple[float, float]]:
    """Seconds per step of both sides, measured in turns after one of each as warm-up; who begins alternates."""
    pairs = []
    for repeat in range(repeats + 1):
        if repeat % 2:
            mine, theirs = ours.seconds(), peer.seconds()
        else:
            theirs, mine = peer.seconds(), ours.seconds()
        pairs.append((mine, theirs))
    return pairs[1:]


def speedup(seeds: Iterable[Iterable[tuple[float, float]]]) -> Difference:
    """Geometric mean of peer / ours over the turns of each seed, with its 95 % interval."""
    found = two_level_bootstrap([[math.log(theirs / mine) for mine, theirs in pairs] for pairs in seeds])
    return Difference(math.exp(found.effect), math.exp(found.low), math.exp(found.high), found.n)


def steps_per_turn(batch: int, tokens: int) -> int:
    """Enough for a tenth of a second; few where the peer takes that long for one."""
    return 4 if batch * tokens >= LONG else 16


def cell(models: tuple[Decoder, Decoder], batch: int, tokens: int, repeats: int) -> dict[str, object]:
    """The figure of one place on the grid."""
    sides = [Decoding(model, batch, tokens, steps_per_turn(batch, tokens)) for model in models]
    pairs = turns(*sides, repeats)
    rates = [[batch / seconds for seconds in side] for side in zip(*pairs, strict=True)]
    found, predicted = speedup([pairs]), predicted_ratio(HYBRID, TRANSFORMER, batch, tokens)
    return figure(f"decode/hybrid_{batch}x{tokens}", *rates, "tokens/s") | {
        "ratio": round(found.effect, 3),
        "ci": [round(found.low, 3), round(found.high, 3)],
        "predicted": round(predicted, 2),
        "cached_tokens": batch * tokens,
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = Decoder(HYBRID).eval(), Decoder(TRANSFORMER).eval()
    found = []
    for batch, tokens in GRID:
        found.append(cell(models, batch, tokens, repeats=7 if "--quick" in sys.argv else 15))
        print(json.dumps(found[-1]), flush=True)
    weakest = min((one for one in found if one["cached_tokens"] >= LONG), key=lambda one: one["ratio"])
    print(json.dumps(weakest | {"name": f"decode/hybrid_{LONG}"}), flush=True)


if __name__ == "__main__":
    main()
