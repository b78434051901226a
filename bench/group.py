"""Samples of prompts that begin alike, with the prefix cache and without.

`generate/group_prefix`: 8 samples of one prompt of 512 tokens, 32 new tokens each, that arrive as requests of their
own, each when the one before it has got its first token. With the cache the prompt is read once. The peer is our own
engine with `prefix_cache_bytes=0`, where every sample reads the prompt. (A group handed over in one call is read once
even without the cache; then there is nothing to gain.)
`generate/group_prefix_later`: then a second group comes, whose prompt continues the first by 32 tokens, as a next turn
or a revision does; only this second group is timed. With the cache it reads the 32 tokens.
Each in a hybrid (`M-M*-M-`, where recurrent memory must be kept too) of hidden size 128; float32, one thread.
`python -m bench.group [--quick]` prints one JSON line per figure: new tokens per second; ratio > 1: the cache pays.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

from bench.figure import figure
from bloomery.generate import Engine, Request, SamplingParams
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder

MODEL = ModelConfig(
    pattern="M-M*-M-", vocab_size=4096, hidden_size=128, intermediate_size=512, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=32, chunk_size=32,
)  # fmt: skip
GROUP, PROMPT, MORE, NEW = 8, 512, 32, 32
CACHE_BYTES = 64 * 2**20


def samples(engine: Engine, prompt: list[int]) -> None:
    """One group: each sample arrives when the one before it has begun."""
    for seed in range(GROUP):
        running = engine.running
        engine.add(Request(prompt, SamplingParams(max_new_tokens=NEW, seed=seed)))
        while engine.running == running:
            engine.step()
    while engine.busy:
        engine.step()


def timed(run: Callable[[], None]) -> float:
    """New tokens per second of the process's own time."""
    start = time.process_time()
    run()
    return GROUP * NEW / (time.process_time() - start)


def turn(engine: Engine, prompt: list[int]) -> tuple[float, float]:
    """Rates of the first and of the later group, beginning with nothing remembered."""
    engine.sync()
    return timed(lambda: samples(engine, prompt[:PROMPT])), timed(lambda: samples(engine, prompt))


def measure(repeats: int) -> list[dict[str, object]]:
    """Both figures: medians of alternating repeats, after one of warm-up."""
    torch.manual_seed(0)
    model, prompt = Decoder(MODEL), torch.randint(MODEL.vocab_size, (PROMPT + MORE,)).tolist()
    sides = [Engine(model, GROUP, PROMPT + MORE + NEW, prefix_cache_bytes=limit) for limit in (CACHE_BYTES, 0)]
    rates = [[turn(engine, prompt) for engine in sides] for _ in range(repeats + 1)][1:]
    names = ("generate/group_prefix", "generate/group_prefix_later")
    return [
        figure(name, [with_[place] for with_, _ in rates], [without[place] for _, without in rates], "tokens/s")
        for place, name in enumerate(names)
    ]


def main() -> None:
    torch.set_num_threads(1)
    for each in measure(repeats=5 if "--quick" in sys.argv else 11):
        print(json.dumps(each), flush=True)


if __name__ == "__main__":
    main()
