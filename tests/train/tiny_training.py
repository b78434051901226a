"""A decoder small enough to train in a test, and data whose next token can be learnt."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bloomery.artifact import Output
from bloomery.config import Config, Field
from bloomery.train.loop import LoopConfig, TrainState
from bloomery.train.losses import next_token
from bloomery.train.optim import adamw
from bloomery.train.run import resumable

VOCAB_SIZE = 13


class TinyModel(nn.Module):
    """Embedding, running mean over the past, one linear layer. Same interface as `Decoder`."""

    def __init__(self, seed: int = 0, hidden_size: int = 8):
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(vocab_size=VOCAB_SIZE, hidden_size=hidden_size)
        self.embeddings = nn.Embedding(VOCAB_SIZE, hidden_size)
        self.mixer = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.RMSNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, VOCAB_SIZE, bias=False)

    def forward(
        self, input_ids: Tensor, segment_ids: Any = None, position_ids: Any = None, checkpoint_activations: bool = False
    ) -> Tensor:
        self.recomputed = checkpoint_activations
        x = self.embeddings(input_ids)
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)
        return self.norm(x + torch.tanh(self.mixer(mean)))


def random_batch(rows: int, seed: int, seq: int = 6, masked: float = 0.3) -> dict[str, Tensor]:
    """Rows that count upwards; some labels are masked; two sources."""
    draw = torch.Generator().manual_seed(seed)
    ids = (torch.randint(VOCAB_SIZE, (rows, 1), generator=draw) + torch.arange(seq + 1)) % VOCAB_SIZE
    labels = ids[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=draw) < masked] = -100
    sources = torch.randint(2, (rows, 1), generator=draw).expand(rows, seq).to(torch.int16)
    return {"input_ids": ids[:, :-1], "labels": labels, "source_ids": sources}


def split(batch: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """Micro-batches of `rows` rows."""
    parts = {name: value.split(rows) for name, value in batch.items()}
    return [{name: value[i] for name, value in parts.items()} for i in range(len(parts["labels"]))]


def stream(position: int, config: LoopConfig) -> Iterator[list[dict[str, Tensor]]]:
    """The batches of step after step: a function of the position alone."""
    while True:
        yield split(random_batch(config.batch_size, seed=position), config.micro_batch_size)
        position += config.batch_size


def loop(**settings: Any) -> LoopConfig:
    """A LoopConfig with small defaults."""
    return LoopConfig(**{"max_steps": 5, "batch_size": 4, "learning_rate": 1e-2, **settings})


def new_state(config: LoopConfig, seed: int = 0) -> TrainState:
    """A fresh model and optimizer, always the same."""
    model = TinyModel(seed)
    return TrainState(model, adamw(model, config))


class TinyConfig(Config):
    """Settings of the stage below."""

    loop: LoopConfig = Field(description="how to train")
    pause_seconds: float = Field(default=0.0, description="pause before each batch, in seconds")


def train(path: Path, config: TinyConfig) -> TrainState:
    """A stage in miniature. Its batches keep a count in `extra` and draw from torch's global generator."""
    state = new_state(config.loop)

    def batches_from(position: int) -> Iterator[list[dict[str, Tensor]]]:
        for batches in stream(position, config.loop):
            time.sleep(config.pause_seconds)
            state.extra["drawn"] = state.extra.get("drawn", 0) + len(batches)
            batches[0]["labels"][0, 0] = torch.randint(VOCAB_SIZE, ())
            yield batches

    with Output(path, "tiny", config) as output:
        for step in resumable(output, state, batches_from, next_token, config.loop):
            if step.step % 4 == 0:
                output.metrics.log(step.step, validation_loss=step.loss)
    return state
