"""Sampling from a small model against `transformers.generate`.

Same weights (the peer loads our export), same prompts, same dtype (float32), one thread, temperature 1 without filters.
All models have hidden size 128 and a vocabulary of 4,096: `generate/dense` a Llama of 4 layers (`*-*-`, 1.4 M
parameters), `generate/hybrid` of 5 (`M-M*-`, 1.6 M), `generate/mamba` a Mamba-2 of 4 (`MMMM`, 1.5 M); docs/generate.md
says how the ratio moves with the shape. Our kernels are built before the clock starts.
Both sides generate exactly NEW tokens for every prompt; no token ends a text. The peer runs with whichever of its cache
implementations is fastest here, and without returning log-probabilities, which ours always computes.
`python -m bench.generate [--quick]` prints one JSON line per figure: new tokens per second; ratio > 1: we are faster.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import transformers

from bench.figure import take_turns
from bloomery.generate import Engine, Request, SamplingParams
from bloomery.model import hf
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder

SIZES = {"vocab_size": 4096, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LLAMA = {"family": "llama", "mlp_gated": True, "mlp_hidden_act": "silu", "rope": RopeConfig(), "intermediate_size": 352}
HYBRID = {
    "intermediate_size": 512, "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 1,
    "chunk_size": 32,  # the peer's fastest for these prompts; ours never scans more than the prompt
}  # fmt: skip
MODELS = {
    "generate/dense": ModelConfig(pattern="*-*-", **LLAMA, **SIZES),
    "generate/hybrid": ModelConfig(pattern="M-M*-", **HYBRID, **SIZES),
    "generate/mamba": ModelConfig(family="mamba2", pattern="MMMM", **HYBRID, **SIZES),
}
BATCH, PROMPT, NEW = 64, 32, 64
PEER_CACHES = (None, "static")

Generate = Callable[[], None]


def our_side(decoder: Decoder, prompts: torch.Tensor) -> Generate:
    """bloomery's engine, all prompts at once."""
    engine = Engine(decoder, max_batch=BATCH, max_tokens=PROMPT + NEW)
    requests = [
        Request(ids, SamplingParams(max_new_tokens=NEW, seed=seed)) for seed, ids in enumerate(prompts.tolist())
    ]

    def generate() -> None:
        completions = engine.generate(requests)
        assert sum(len(completion.token_ids) for completion in completions) == BATCH * NEW

    return generate


def peer_side(decoder: Decoder, prompts: torch.Tensor) -> Generate:
    """transformers: the same weights, its fastest cache."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save(decoder, folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=NEW, pad_token_id=0, disable_compile=True
    )
    mask = torch.ones_like(prompts)

    def generate(cache: str | None) -> None:
        chosen = {"cache_implementation": cache} if cache else {}
        out = model.generate(prompts, attention_mask=mask, **chosen)
        assert out.shape == (BATCH, PROMPT + NEW)

    caches = PEER_CACHES[: 1 if "M" in decoder.config.pattern else None]  # a hybrid has one kind only
    best = min(caches, key=lambda cache: min(seconds(lambda: generate(cache)) for _ in range(2)))
    return lambda: generate(best)


def seconds(run: Generate) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, repeats: int) -> dict[str, object]:
    """One figure: medians of alternating repeats."""
    torch.manual_seed(0)
    decoder = Decoder(MODELS[name]).eval()
    prompts = torch.randint(0, SIZES["vocab_size"], (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
    sides = our_side(decoder, prompts), peer_side(decoder, prompts)
    return take_turns(name, *sides, BATCH * NEW, "tokens/s", repeats)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in MODELS:
        print(json.dumps(measure(name, repeats=5 if "--quick" in sys.argv else 11)), flush=True)


if __name__ == "__main__":
    main()
