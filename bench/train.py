"""A training step (forward, backward, AdamW) against transformers' classes, and against the machine's matrix products.

`train/dense`, `train/hybrid`, `train/mamba`: same weights, same tokens, same dtype (float32), one thread, CPU seconds
(so that a busy machine disturbs less). The peer computes its loss with `labels=` and steps `torch.optim.AdamW` at its
defaults, we without clipping; its scan runs at whichever chunk length is fastest for it. Tokens per second.

`train/dense_limit`, `train/hybrid_limit`: 25 million parameters at sequence 512 in the library's own loop, clipping and
all; the peer is the fastest matrix product of this machine, see `bench/_limit.py`.

`python -m bench.train [--quick]` prints one JSON line per figure; a ratio above 1 means we are faster.
`python -m bench.train --device cuda` measures on a GPU instead: dense, hybrid and experts of about a billion parameters
against the GPU's bf16 products, and dense in FP8 against bf16. `--smoke` does so with tiny sizes, on any device.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
import transformers

from bench._limit import limit
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
    "train/mamba": ModelConfig(family="mamba2", pattern="M" * 6, **HYBRID, **SIZES),
}
BATCH, SEQ = 32, 128
PEER_CHUNKS = (32, 64, 128)

MEDIUM = {"vocab_size": 8192, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
LIMITS = {
    "train/dense_limit": ModelConfig(pattern="*-" * 6, **LLAMA | {"intermediate_size": 1408}, **MEDIUM),
    "train/hybrid_limit": ModelConfig(
        pattern="M-M-M-M*-M-M-", intermediate_size=1024, mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=64,
        **MEDIUM,
    ),
}  # fmt: skip
LIMIT_BATCH, LIMIT_SEQ = 8, 512

LARGE = {"vocab_size": 32768, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
EXPERTS = {
    "family": "mixtral", "intermediate_size": 0, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 1536, "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 4,
}  # fmt: skip
BILLION = {
    "train/dense_1b": ModelConfig(pattern="*-" * 18, **LLAMA | {"intermediate_size": 5632}, **LARGE),
    "train/hybrid_1b": ModelConfig(
        pattern="M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-", intermediate_size=8192, mamba_num_heads=64, mamba_head_dim=64,
        ssm_state_size=128, n_groups=8, chunk_size=128, **LARGE,
    ),
    "train/moe_1b": ModelConfig(pattern="*E" * 12, **LLAMA | LARGE | EXPERTS),
}  # fmt: skip
BILLION_BATCH, BILLION_SEQ = 2, 4096
SMOKE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
    "moe_intermediate_size": 32,
}  # fmt: skip

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


def billion(device: str, repeats: int, smoke: bool) -> Iterator[dict[str, object]]:
    """The figures of a GPU: bf16 against its products, and FP8 against bf16."""
    batch, seq = (2, 64) if smoke else (BILLION_BATCH, BILLION_SEQ)
    for name, config in BILLION.items():
        if smoke:
            unused = {"intermediate_size"} if "E" in config.pattern else {"moe_intermediate_size"}
            sizes = {key: value for key, value in SMOKE.items() if key not in unused}
            config = config.model_copy(update=sizes | {"pattern": config.pattern[-8:]})
        bf16 = limit(name, config, batch, seq, repeats, device, "bf16")
        yield bf16
        if name == "train/dense_1b":
            fp8 = limit(f"{name}_fp8", config, batch, seq, repeats, device, "fp8")
            yield fp8 | {"peer": bf16["ours"], "ratio": round(fp8["ours"] / bf16["ours"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for found in figures(given.device, given.quick, given.smoke):
        print(json.dumps(found), flush=True)


def figures(device: str, quick: bool, smoke: bool) -> Iterator[dict[str, object]]:
    """Everything that this file measures there."""
    if device == "cuda" and not torch.cuda.is_available():
        print("bench.train --device cuda: no GPU on this machine, nothing measured", file=sys.stderr)
        return
    if device == "cuda" or smoke:
        yield from billion(device, repeats=1 if smoke else 3 if quick else 10, smoke=smoke)
        return
    for name in MODELS:
        yield measure(name, repeats=4 if quick else 11)
    batch, repeats = (2, 3) if quick else (LIMIT_BATCH, 7)
    for name, config in LIMITS.items():
        yield limit(name, config, batch, LIMIT_SEQ, repeats)


if __name__ == "__main__":
    main()
