"""Bytes a decoding step must move, and the speed they allow: decoding is bound by memory, not by arithmetic.

A step of B sequences that hold L tokens each reads the weights once, every key and value, and reads and writes every
Mamba-2 state: W + B·(c·L + 2·s) bytes. Activations, and the rows of the input embedding, are left out.
"""

import math
import time
from dataclasses import dataclass

import torch

from bloomery.model.config import ModelConfig
from bloomery.model.matched import matched_transformer


@dataclass(frozen=True)
class StepBytes:
    """Bytes moved by one decoding step of a whole batch."""

    weights: int
    key_values: int
    states: int

    @property
    def total(self) -> int:
        """All bytes of the step."""
        return self.weights + self.key_values + self.states


def step_bytes(config: ModelConfig, batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> StepBytes:
    """Of `batch` sequences that hold `tokens` tokens each, weights and cache in `dtype`, Mamba-2 states in float32.

    Of E layers, the experts that `batch` tokens are expected to choose when all are equally likely.
    """
    seen = min(tokens, config.sliding_window or tokens)
    return StepBytes(
        weights=round(_weights_read(config, batch) * dtype.itemsize),
        key_values=batch * key_value_bytes(config, dtype) * seen,
        states=2 * batch * state_bytes(config, dtype),
    )


def key_value_bytes(config: ModelConfig, dtype: torch.dtype = torch.float32) -> int:
    """Cache bytes that one more token of context costs one sequence (c)."""
    return config.cache_bytes(1, 1, dtype) - config.cache_bytes(1, 0, dtype)


def state_bytes(config: ModelConfig, dtype: torch.dtype = torch.float32) -> int:
    """Cache bytes of one sequence that do not depend on its length (s): Mamba-2 states and convolution columns."""
    return config.cache_bytes(1, 0, dtype)


def predicted_ratio(
    hybrid: ModelConfig, peer: ModelConfig, batch: int, tokens: int, dtype: torch.dtype = torch.float32
) -> float:
    """How many times faster than `peer` the hybrid should decode: the ratio of their bytes."""
    return step_bytes(peer, batch, tokens, dtype).total / step_bytes(hybrid, batch, tokens, dtype).total


def crossover(
    hybrid: ModelConfig, peer: ModelConfig, batch: int, ratio: float = 1.0, dtype: torch.dtype = torch.float32
) -> float:
    """Tokens of context from which each of `batch` sequences should decode `ratio` times as fast as with `peer`.

    Infinite where the caches grow too much alike for it; cached tokens in all (B·L) are `batch` times as many.
    Sliding windows are not considered.
    """
    ours, theirs = step_bytes(hybrid, batch, 0, dtype).total, step_bytes(peer, batch, 0, dtype).total
    gained = key_value_bytes(peer, dtype) - ratio * key_value_bytes(hybrid, dtype)
    missing = ratio * ours - theirs
    if missing <= 0:
        return 0.0
    return missing / (batch * gained) if gained > 0 else math.inf


def equal_memory(hybrid: ModelConfig, peer: ModelConfig, dtype: torch.dtype = torch.float32) -> float:
    """Tokens of context from which a sequence of the hybrid takes less cache memory than one of `peer`."""
    more = state_bytes(hybrid, dtype) - state_bytes(peer, dtype)
    gained = key_value_bytes(peer, dtype) - key_value_bytes(hybrid, dtype)
    if more <= 0:
        return 0.0
    return more / gained if gained > 0 else math.inf


def largest_batch(config: ModelConfig, tokens: int, cache_bytes: int, dtype: torch.dtype = torch.float32) -> int:
    """Sequences of `tokens` tokens whose caches fit into `cache_bytes` together."""
    return cache_bytes // config.cache_bytes(1, tokens, dtype)


def tokens_per_second(
    config: ModelConfig, batch: int, tokens: int, bandwidth: float, dtype: torch.dtype = torch.float32
) -> float:
    """The most a memory of `bandwidth` bytes/s allows; `read_bandwidth` measures one."""
    return batch * bandwidth / step_bytes(config, batch, tokens, dtype).total


def read_bandwidth(device: torch.device | str = "cpu", size: int = 1 << 29, repeats: int = 5) -> float:
    """Bytes/s at which a matrix–vector product reads `size` bytes of float32: the fastest of `repeats` readings.

    Choose `size` beyond the last cache, or the cache is what is measured.
    """
    columns = 8192
    matrix = torch.ones(max(size // (4 * columns), 1), columns, device=device)
    vector = torch.ones(columns, device=device)
    return matrix.nbytes / min(_seconds(matrix, vector) for _ in range(repeats + 1))


def against_transformer(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, float | None]:
    """What `bloomery inspect` prints: the matched Transformer, and from which context on the hybrid gains; `None`:
    never."""
    peer = matched_transformer(config)
    return {
        "transformer_blocks": peer.pattern.count("*"),
        "transformer_intermediate_size": peer.intermediate_size,
        "transformer_parameters": peer.count_parameters(),
        "transformer_bytes_per_token": key_value_bytes(peer, dtype),
        "bytes_per_token": key_value_bytes(config, dtype),
        "state_bytes": state_bytes(config, dtype),
        "less_memory_from_tokens": _whole(equal_memory(config, peer, dtype)),
        "faster_from_tokens": _whole(crossover(config, peer, 1, dtype=dtype)),
        "most_times_faster": key_value_bytes(peer, dtype) / max(key_value_bytes(config, dtype), 1),
    }


def _whole(tokens: float) -> int | None:
    return math.ceil(tokens) if math.isfinite(tokens) else None


def _weights_read(config: ModelConfig, batch: int) -> float:
    """Parameters that a step of `batch` tokens reads: all but the input embedding and the experts nobody chose."""
    read = float(config.count_parameters())
    if not config.tie_word_embeddings:
        read -= config.vocab_size * config.hidden_size
    if "E" in config.pattern:
        unchosen_by_one = config.count_parameters() - config.count_parameters(active=True)
        read -= unchosen_by_one * (1 - config.num_experts_per_tok / config.n_routed_experts) ** (batch - 1)
    return read


def _seconds(matrix: torch.Tensor, vector: torch.Tensor) -> float:
    start = time.perf_counter()
    float(torch.mv(matrix, vector)[0])  # reading the value waits for an accelerator
    return time.perf_counter() - start
