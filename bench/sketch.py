"""Sketches of per-sample gradients, gradient and projection together, d = 1,024, on one thread.

A dense Llama of 2 million parameters, 16 samples of 256 tokens of which 192 are learnt, float32, CPU seconds.
`sketch/dense_loop`: against the published way (arXiv 2505.20161): one backward pass a sample, its gradients projected
four at a time by dense random signs that are drawn anew for each block of the sketch, as they are where no CUDA
projector is.
`sketch/limit`: against one plain batched forward and backward pass of the same samples, the floor for any way to their
gradients (but for those of weights, which the hooks never make).
`sketch/hybrid_limit`: the same for a hybrid of 2 million parameters (Mamba-2, attention, MLP).
`python -m bench.sketch [--quick]` prints one JSON line per figure: samples per second; ratio > 1: ours is faster.
"""

import json
import sys
import time

import torch
from torch import Tensor

from bench.figure import figure, take_turns
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.synthesize.gradients import by_loop, sketch
from bloomery.synthesize.sketch import SketchConfig, Sketcher
from bloomery.train.losses import next_token

DIM, SAMPLES, SEQ, PROMPT, FLUSH = 1024, 16, 256, 64, 4
_BLOCK = 64  # numbers of the sketch whose signs are drawn together: 512 MB
SIZES = {"vocab_size": 2048, "hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32}
DENSE = ModelConfig(
    family="llama", pattern="*-" * 3, mlp_gated=True, mlp_hidden_act="silu", rope=RopeConfig(), intermediate_size=512,
    **SIZES,
)  # fmt: skip
HYBRID = ModelConfig(
    pattern="M-M*-M-", intermediate_size=512, mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=64, n_groups=1,
    **SIZES,
)  # fmt: skip
Batch = dict[str, Tensor]


def samples(config: ModelConfig, count: int = SAMPLES) -> Batch:
    """Random tokens; the prompt is not learnt."""
    tokens = torch.randint(config.vocab_size, (count, SEQ + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": tokens[:, :-1], "labels": labels}


def dense_loop(model: Decoder, batch: Batch) -> Tensor:
    """As published: gradients of one sample after another, four of them projected together."""
    parameters, found = list(model.parameters()), []
    for start in range(0, len(batch["labels"]), FLUSH):
        gradients = []
        for number in range(start, start + FLUSH):
            loss = next_token(model, {name: value[number : number + 1] for name, value in batch.items()})
            parts = torch.autograd.grad(loss.sum / loss.weight, parameters)
            gradients.append(torch.cat([part.flatten() for part in parts]))
        found.append(_project(torch.stack(gradients)))
    return torch.cat(found)


def _project(gradients: Tensor) -> Tensor:
    """(n, parameters) → (n, DIM); the signs are those of one seed every time."""
    draw, count = torch.Generator().manual_seed(0), gradients.shape[1]
    parts = []
    for _ in range(0, DIM, _BLOCK):
        signs = torch.randint(0, 2, (count, _BLOCK), generator=draw, dtype=torch.int8).float().mul_(2).sub_(1)
        parts.append(gradients @ signs)
    return torch.cat(parts, 1) / DIM**0.5


def plain(model: Decoder, batch: Batch) -> None:
    """One forward and backward pass of all samples together."""
    for parameter in model.parameters():
        parameter.grad = None
    next_token(model, batch).sum.backward()


def limit(name: str, config: ModelConfig, repeats: int) -> dict[str, object]:
    """Ours against the plain pass."""
    torch.manual_seed(0)
    model, sketcher, batch = Decoder(config).eval(), Sketcher(SketchConfig(dim=DIM)), samples(config)
    return take_turns(
        name, lambda: sketch(model, batch, sketcher), lambda: plain(model, batch), SAMPLES, "samples/s", repeats
    )


def against_the_loop(repeats: int) -> dict[str, object]:
    """Ours on the whole batch, the loop on its first four, which take it long enough."""
    torch.manual_seed(0)
    model, sketcher, batch = Decoder(DENSE).eval(), Sketcher(SketchConfig(dim=DIM)), samples(DENSE)
    few = {name: value[:FLUSH] for name, value in batch.items()}
    wanted, _ = by_loop(model, few, sketcher)
    torch.testing.assert_close(sketch(model, batch, sketcher)[0][:FLUSH], wanted, rtol=1e-3, atol=1e-5)
    ours, peer = [], []
    for _ in range(repeats):
        ours.append(_rate(SAMPLES, lambda: sketch(model, batch, sketcher)))
        peer.append(_rate(FLUSH, lambda: dense_loop(model, few)))
    return figure("sketch/dense_loop", ours, peer, "samples/s")


def _rate(count: int, run: object) -> float:
    start = time.process_time()
    run()  # type: ignore[operator]
    return count / (time.process_time() - start)


def main() -> None:
    torch.set_num_threads(1)
    quick = "--quick" in sys.argv
    print(json.dumps(limit("sketch/limit", DENSE, 5 if quick else 21)), flush=True)
    print(json.dumps(limit("sketch/hybrid_limit", HYBRID, 5 if quick else 21)), flush=True)
    print(json.dumps(against_the_loop(2 if quick else 5)), flush=True)


if __name__ == "__main__":
    main()
