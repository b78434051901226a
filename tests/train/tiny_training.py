"""A decoder small enough to train in a test, and data whose next token can be learnt."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bloomery.train.loop import LoopConfig, TrainState
from bloomery.train.optim import adamw

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
