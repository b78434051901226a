"""A whole GRPO step (roll out, judge, update) against TRL's GRPOTrainer.

Same weights, prompts, group size and 0/1 reward, float32, fused AdamW, clipping, one thread each; both sides on-policy
with group-normalised advantages, a token mean and no KL term. They take turns, step by step.

`grpo/step`: the model of `recipes/tiny.yaml` (hybrid, vocabulary 512), prompts of 16 tokens, completions of at most 64
that end where the model ends them, after about 26 as in the recipe, at the same odds on both sides.
`grpo/step_equal`: the same with completions of exactly 28 tokens, so that the peer pads nothing.
`grpo/step_dense`: a Llama of 2 M parameters and completions of exactly 64 tokens. It is the peer's best case: more than
half of our time is matrix products that both sides must do.
Where lengths are exact, the end token lies outside the vocabulary.

TRL's settings are the fastest found for it on a CPU: its own `generate` loop, no gradient checkpointing, one
micro-batch. Static caches, torch.compile and smaller micro-batches change nothing beyond noise; continuous
batching of transformers takes eight times as long. Its Mamba scan runs at chunks of 32, its fastest.
`python -m bench.grpo [--quick]` prints one JSON line per figure: completion tokens per second of whole steps.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.figure import figure
from bench.peers import Peer
from bloomery.data.pack import Batch
from bloomery.data.prompts import Prompt
from bloomery.generate.engine import Engine
from bloomery.generate.sampling import SamplingParams
from bloomery.model import hf
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.posttrain.batches import micro_batches
from bloomery.posttrain.policy import PolicyGradient
from bloomery.posttrain.rollouts import roll_out
from bloomery.train.loop import LoopConfig, TrainState, steps
from bloomery.train.optim import adamw
from bloomery.verify.verdict import Verdict

LLAMA = ModelConfig(
    family="llama", pattern="*-" * 4, vocab_size=1024, hidden_size=192, intermediate_size=512, mlp_gated=True,
    mlp_hidden_act="silu", num_attention_heads=6, num_key_value_heads=3, head_dim=32, rope=RopeConfig(),
)  # fmt: skip
HYBRID = ModelConfig(
    pattern="M-M-*-M-", vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=32, n_groups=1,
    chunk_size=32,
)  # fmt: skip
PROMPTS, GROUP = 8, 8
LEARNING_RATE = 1e-6  # so small that lengths stay what they are
MICRO_BATCH = 32
END_WEIGHT = 0.048
MAX_STEPS = 1000  # more than any measurement takes
_PEER = Path(__file__).parent / "_grpo_trl.py"


@dataclass(frozen=True)
class Case:
    """One figure: a model, the length of every prompt and of a completion: exact, or at most where `ends`."""

    name: str
    model: ModelConfig
    prompt_tokens: int
    new_tokens: int
    ends: bool = False


CASES = (
    Case("grpo/step", HYBRID, prompt_tokens=16, new_tokens=64, ends=True),
    Case("grpo/step_equal", HYBRID, prompt_tokens=16, new_tokens=28),
    Case("grpo/step_dense", LLAMA, prompt_tokens=32, new_tokens=64),
)


def build_model(case: Case) -> Decoder:
    """Random weights. Where completions end, the last token of the vocabulary has odds of about 1 in 27 at every place.

    A constant in all embeddings reaches the last norm; the end token's row of the head reads it.
    """
    torch.manual_seed(0)
    model = Decoder(case.model)
    if case.ends:
        with torch.no_grad():
            model.embeddings.weight += 0.1
            model.lm_head.weight[-1] = END_WEIGHT
    return model


def tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word, `w0`, `w1` …; the end token is one more than these."""
    words = {f"w{number}": number for number in range(vocabulary)}
    inner = Tokenizer(models.WordLevel(words | {"<end>": len(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<end>", eos_token="<end>")
    fast.save_pretrained(folder)
    return fast


class InlineVerifier:
    """Stands where the verifier pool stands; the reward is so cheap that a process would only add time."""

    def submit(self, verifier: str, text: str, answer: str) -> "Future[Verdict]":
        """1 where the bytes of the text add up to an even number: the peer's reward."""
        future: Future[Verdict] = Future()
        future.set_result(Verdict(1.0 - sum(text.encode()) % 2, "correct", ""))
        return future


def our_steps(model: Decoder, prompts: list[Prompt], params: SamplingParams, decode: Any) -> Iterator[int]:
    """One optimizer step a turn; yields the completion tokens of its rollouts."""
    rows, new_tokens = len(prompts) * GROUP, params.max_new_tokens
    loop = LoopConfig(max_steps=MAX_STEPS, batch_size=rows, learning_rate=LEARNING_RATE, weight_decay=0.0,
                      schedule="constant", precision="fp32")  # fmt: skip
    engine = Engine(model, max_batch=rows, max_tokens=len(prompts[0].ids) + new_tokens, decode=decode)
    written: list[int] = []

    def batches() -> Iterator[list[Batch]]:
        for step in range(MAX_STEPS):
            engine.sync()
            rollouts = roll_out(engine, InlineVerifier(), prompts, GROUP, params, (0, step))  # type: ignore[arg-type]
            written.append(sum(sample.tokens for sample in rollouts.samples))
            yield micro_batches(rollouts, MICRO_BATCH, 0, "token_mean", new_tokens, keep_all=True)

    objective = PolicyGradient(temperature=1.0, max_logprob_gap=1e-3)
    for _ in steps(TrainState(model, adamw(model, loop)), batches(), objective, loop):
        yield written[-1]


def measure(case: Case, repeats: int, **peer_settings: Any) -> dict[str, object]:
    """One figure: medians of alternating steps, after one warm-up step each."""
    model, words = build_model(case), case.model.vocab_size - case.ends
    ids = torch.randint(words, (PROMPTS, case.prompt_tokens)).tolist()
    rows = PROMPTS * GROUP
    with tempfile.TemporaryDirectory() as folder:
        hf.save(model, folder)
        fast = tokenizer(Path(folder), words)
        texts = [" ".join(f"w{token}" for token in prompt) for prompt in ids]
        prompts = [Prompt(text, "bench", [], "", "", tuple(row)) for text, row in zip(texts, ids, strict=True)]
        settings = {"model": folder, "prompts": texts, "group_size": GROUP, "new_tokens": case.new_tokens,
                    "max_steps": MAX_STEPS, "learning_rate": LEARNING_RATE, "micro_batch_size": rows,
                    "extra": {}}  # fmt: skip
        params = SamplingParams(max_new_tokens=case.new_tokens, stop_token_ids=(words,) if case.ends else ())
        turns = our_steps(model, prompts, params, fast.decode)
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        with Peer(_PEER, [json.dumps(settings | peer_settings)]) as peer:
            for repeat in range(repeats + 1):
                start = time.perf_counter()
                tokens = next(turns)
                seconds = time.perf_counter() - start
                answer = peer.ask()
                theirs = answer["mean_length"] * rows
                assert case.ends or tokens == theirs == rows * case.new_tokens, "the two sides did unequal work"
                if repeat:
                    rates["ours"].append(tokens / seconds)
                    rates["peer"].append(theirs / answer["seconds"])
    return figure(case.name, rates["ours"], rates["peer"], "completion tokens/s", answer["versions"])


def main() -> None:
    torch.set_num_threads(1)
    for case in CASES:
        print(json.dumps(measure(case, repeats=5 if "--quick" in sys.argv else 15)), flush=True)


if __name__ == "__main__":
    main()
