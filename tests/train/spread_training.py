"""A tiny mixture of experts in float64, and rows for it, trained by as many ranks as a mapping has."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from exact_training import in_float64, next_token_exact

from bloomery.data.pack import Batch
from bloomery.model.balance import BalanceConfig
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.settings import ParallelConfig
from bloomery.train.checkpoint import Checkpoints, _tensors
from bloomery.train.loop import LoopConfig, TrainState, steps
from bloomery.train.spread import row_batches, spread

SEQ = 16
LOOP = LoopConfig(
    max_steps=100, batch_size=8, learning_rate=1e-2, schedule="constant", precision="fp32", checkpoint_every_steps=2,
    balance=BalanceConfig(kind="sequence"),  # within a micro-batch, it would depend on how rows are grouped
)  # fmt: skip
MAPPINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor, context and experts": (8, {"tensor": 2, "context": 2, "expert": 4}),
    "pipeline": (4, {"pipeline": 2, "tensor": 2, "expert": 2}),
    "data": (2, {}),
    "experts by width, zero 3": (8, {"expert": 4, "expert_tensor": 2, "zero": 3}),
    "one process": (1, {}),
}
"""Name → ranks, degrees."""


def model_config(**changes: Any) -> ModelConfig:
    """Every kind of layer."""
    return ModelConfig(**{
        "pattern": "ME*-", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
        "n_groups": 2, "chunk_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "max_position_embeddings": SEQ, **changes,
    })  # fmt: skip


class Rows:
    """Sequence k counts upwards from a place that k decides. `read` keeps what was asked for."""

    num_sequences = None

    def __init__(self) -> None:
        self.read: list[int] = []

    def batch(self, start: int, stop: int) -> Batch:
        numbers = torch.arange(start, stop)
        self.read += numbers.tolist()
        ids = ((numbers * 7 % 24)[:, None] + torch.arange(SEQ + 1) * (1 + numbers % 3)[:, None]) % 24
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def new_state(degrees: dict[str, Any], seed: int = 0, **changes: Any) -> TrainState:
    torch.manual_seed(seed)
    return spread(Decoder(model_config(**changes)).double(), ParallelConfig(**degrees), LOOP, SEQ)


def train(state: TrainState, last: int) -> tuple[list[float], list[int]]:
    """Losses up to step `last`, and the sequences that this rank read for them."""
    rows, config = Rows(), LOOP.model_copy(update={"max_steps": last})
    batches = row_batches(rows, state.position, config, state.parallel)
    with in_float64():
        return [step.loss for step in steps(state, batches, next_token_exact, config)], rows.read


def parts(state: TrainState) -> dict[str, Any]:
    """Everything this rank would save."""
    return {name: (shard.piece, shard.local.clone()) for name, shard in _tensors(state).items()}


def assembled(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The whole tensors of which `ranks` hold parts; NaN where none does."""
    whole: dict[str, torch.Tensor] = {}
    for name, (piece, local) in ((n, part) for rank in ranks for n, part in rank.items() if not n.startswith("random")):
        full = whole.setdefault(name, torch.full(piece.shape, torch.nan, dtype=local.dtype))
        piece.put(local, full)
    return whole


def leg(folder: Path, degrees: dict[str, Any], last: int) -> dict[str, Any]:
    """Go on from the newest checkpoint under another mapping, up to step `last`, and save."""
    state, said = new_state(degrees, seed=99), io.StringIO()
    with Checkpoints(folder) as checkpoints, redirect_stderr(said):
        resumed = checkpoints.load_latest(state)
        if not resumed:
            state = new_state(degrees)
        loaded = parts(state)
        losses, read = train(state, last)
        checkpoints.save(state)
    first = state.parallel is None or all(
        state.parallel.meshes.place(a) == 0 for a in ("pipeline", "context", "tensor")
    )
    return {
        "resumed": resumed, "loaded": loaded, "losses": losses, "saved": parts(state), "position": state.position,
        "read": read if first else [], "said": said.getvalue(),
    }  # fmt: skip


def fails(function: Callable[..., Any], *arguments: Any) -> str:
    """The message of what it raises; ranks meet again afterwards."""
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001 - the test reads it
        return f"{type(error).__name__}: {error}"
    finally:
        dist.barrier()
    return ""
