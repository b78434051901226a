"""A training step (forward, backward, AdamW, no clipping) against transformers' classes in a plain loop.

Same weights, same tokens, same dtype (float32), one thread, CPU seconds (so that a busy machine disturbs less). The
peer computes its loss with `labels=` and steps `torch.optim.AdamW` at its defaults; its scan runs at whichever chunk
length is fastest for it.
`python -m bench.train [--quick]` prints one JSON line per figure: tokens per second, ratio above 1 means we are faster.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import transformers

from bench.figure import take_turns
from bloomery.model import hf
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.train.losses import next_token
from bloomery.train.optim import decay_groups

SIZES = {"vocab_size": 2048, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LLAMA = {"family": "llama", "mlp_gated": True, "mlp_hidden_act": "silu", "rope": RopeConfig(), "intermediate_size": 352}
HYBRID = {
    "intermediate_size": 512, "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 64, "n_groups": 1,
}  # fmt: skip
MODELS = {
    "train/dense": ModelConfig(pattern="*-" * 4, **LLAMA, **SIZES),
    "train/hybrid": ModelConfig(pattern="M-M-M*-M-", **HYBRID, **SIZES),
}
BATCH, SEQ = 32, 128
PEER_CHUNKS = (32, 64, 128)

Step = Callable[[], None]


def our_step(config: ModelConfig, tokens: torch.Tensor) -> tuple[Decoder, Step]:
    """bloomery: chunked cross-entropy, fused AdamW without decay on vectors."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    decayed, plain = decay_groups(decoder)
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=1e-4, fused=True)
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}

    def step() -> None:
        loss = next_token(decoder, batch)
        (loss.sum / loss.weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    return decoder, step


def peer_step(decoder: Decoder, tokens: torch.Tensor) -> Step:
    """transformers: the same weights, loaded from our export."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save(decoder, folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.train()
    if "M" in decoder.config.pattern:
        set_chunk(model, best_chunk(model, tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, :-1].contiguous()

    def step() -> None:
        model(input_ids=inputs, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def best_chunk(model: torch.nn.Module, tokens: torch.Tensor) -> int:
    """The peer's scan length that makes its own forward and backward fastest."""

    def seconds(chunk: int) -> float:
        set_chunk(model, chunk)
        start = time.process_time()
        model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss.backward()
        model.zero_grad()
        return time.process_time() - start

    seconds(PEER_CHUNKS[0])
    return min(PEER_CHUNKS, key=seconds)


def set_chunk(model: torch.nn.Module, chunk: int) -> None:
    """Sets the scan length of every Mamba layer of a transformers model."""
    for module in model.modules():
        if hasattr(module, "chunk_size"):
            module.chunk_size = chunk


def measure(name: str, repeats: int) -> dict[str, object]:
    """One figure: medians of alternating repeats."""
    tokens = torch.randint(0, SIZES["vocab_size"], (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(1))
    decoder, ours = our_step(MODELS[name], tokens)
    return take_turns(name, ours, peer_step(decoder, tokens), BATCH * SEQ, "tokens/s", repeats)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in MODELS:
        print(json.dumps(measure(name, repeats=5 if "--quick" in sys.argv else 11)), flush=True)


if __name__ == "__main__":
    main()
