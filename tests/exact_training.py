"""Small models and batches in float64, where what several ranks compute must equal one process to rounding."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomery.data.pack import Batch
from bloomery.model import balance
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.train.losses import Loss, hidden_states

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 16, "rope": RopeConfig(), "initializer_range": 0.2,
}  # fmt: skip
MLP = {"intermediate_size": 24}
MAMBA = {"mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7}


def tiny(pattern: str, seed: int = 0, **settings: object) -> Decoder:
    """A decoder in float64 of these layers."""
    sizes = SIZES | (MLP if "-" in pattern else {}) | (MAMBA if "M" in pattern else {})
    torch.manual_seed(seed)
    config = ModelConfig(pattern=pattern, **sizes | (EXPERTS if "E" in pattern else {}) | settings)
    return Decoder(config).double()


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what a model computes in float32 for its precision it computes in float64."""
    single = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = single


def next_token_exact(model: nn.Module, batch: Batch) -> Loss:
    """`losses.next_token` without its float32."""
    labels = batch["labels"].flatten()
    count = (labels != -100).sum()
    balance.weigh(model, batch["labels"] != -100, batch.get("counted"))
    hidden = hidden_states(model, batch).flatten(0, 1)
    losses = F.cross_entropy(hidden @ model.lm_head.weight.T, labels, reduction="none", ignore_index=-100)
    added, metrics = balance.terms(model) or (0.0, {})
    return Loss(losses.sum() + added, count, metrics | {"first": (losses.detach()[:3].sum(), 3.0)})


def micro_batches(count: int, rows: int = 2, seq: int = 8, seed: int = 0, masked: float = 0.3) -> list[Batch]:
    """Rows of two documents each; what is masked differs from row to row."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(32, (rows, seq + 1), generator=draw)
        labels = ids[:, 1:].clone()
        labels[torch.rand(rows, 1, generator=draw) * 2 * masked > torch.rand(rows, seq, generator=draw)] = -100
        cut = torch.randint(1, seq, (rows, 1), generator=draw)
        places = torch.arange(seq).expand(rows, seq)
        segments = (places >= cut).long()
        positions = places - cut * segments
        found.append({"input_ids": ids[:, :-1], "labels": labels, "segment_ids": segments, "position_ids": positions})
    return found


def alone(model: Decoder, batches: list[Batch]) -> tuple[float, float, dict[str, Tensor], float]:
    """Sum and weight of the loss, every gradient and their norm, computed in one process."""
    model = copy.deepcopy(model)
    model.train()
    losses = [next_token_exact(model, batch) for batch in batches]
    for loss in losses:
        loss.sum.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    return sum(float(loss.sum.detach()) for loss in losses), sum(float(loss.weight) for loss in losses), gradients, norm


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All of them, to 1e-9 of the largest number of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()), msg=name)
