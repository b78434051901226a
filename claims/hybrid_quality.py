"""A hybrid with one attention layer in eleven learns as well as a Transformer of its size on the same data.

Nemotron-H (arXiv 2504.03624) compares an 8B hybrid with an 8B Transformer trained on the same 15 T tokens. Here four
models of about a third of a million parameters read the same bytes in the same order, from weights of the same seed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bloomery.claim import Cells, Claim, Expectation, Finding, picture
from bloomery.data.pack import IGNORE, Batch
from bloomery.evaluate.statistics import Difference, two_level_bootstrap
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.model.matched import matched_transformer
from bloomery.train.loop import LoopConfig, TrainState, steps
from bloomery.train.losses import next_token, token_logprobs
from bloomery.train.optim import adamw
from claims import _corpus as corpus

# The size that four arms and five seeds finish in half an hour of one core. At 2 M parameters (hidden_size 128,
# intermediate_size 768) and 10 M tokens (STEPS 9766) it takes about 40 times as long.
LENGTH, BATCH, STEPS = 128, 8, 1024
HELD_OUT_ROWS, CURVE_ROWS, CURVE_POINTS = 256, 32, 16
HYBRID = ModelConfig(
    pattern="M-M-M*-M-M-", vocab_size=corpus.VOCABULARY, hidden_size=64, intermediate_size=256,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=32,
    chunk_size=32, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    initializer_range=0.1,  # about 1/√64; at the usual 0.02 no arm had begun to recall after 2,560 rows of nothing else
)  # fmt: skip
ARMS = ("hybrid", "transformer", "mamba", "hybrid-rope")
# each the best of 2e-3, 4e-3, 8e-3 and 1.6e-2 on seed 900 at a quarter of the length
RATES = {"hybrid": 0.004, "transformer": 0.004, "mamba": 0.004, "hybrid-rope": 0.004}

CHANCE = 0.1  # of guessing one of ten digits
EXPECTED = (
    Expectation(
        "the hybrid's loss on held-out text equals the Transformer's (relative difference)", "within", 0.01,
        "8B after 15 T tokens: equal, mean of 15 tasks 63.96 against 63.71",
    ),
    Expectation(
        "control: the hybrid has learnt to recall (accuracy minus chance, 10 %)", "above", 0.1, "not measured apart",
        note="Unless shown, nothing can be said of who recalls better, and the next two are inconclusive.",
    ),
    Expectation(
        "the hybrid recalls no worse than the Transformer (difference of accuracy, margin 5 points)", "above", -0.05,
        "not measured apart",
    ),
    Expectation(
        "without attention, recall is worse (accuracy of pure Mamba-2 minus hybrid)", "below", 0.0,
        "the reason given for keeping 8 % attention (arXiv 2406.07887)",
    ),
    Expectation(
        "no positions are needed: the hybrid's loss without RoPE is no worse than with it (relative difference, margin "
        "1 %)", "below", 0.01, "no position signal used; not ablated",
    ),
)  # fmt: skip
LIMITS = """
Too few parameters and tokens by far to say anything of an 8B model: see the sizes below. What a model of this size
learns of code in a million bytes is spelling and layout. No downstream task is measured, nothing beyond a row of 128
bytes, and one depth and one share of attention only.
"""


def config(arm: str) -> ModelConfig:
    """The model of an arm; all have the hybrid's number of parameters within 1 %."""
    if arm == "transformer":
        return matched_transformer(HYBRID, rope=RopeConfig())
    if arm == "mamba":
        return _as_large_as_hybrid(pattern=HYBRID.pattern.replace("*", "M"))
    return HYBRID.model_copy(update={"rope": RopeConfig()}) if arm == "hybrid-rope" else HYBRID


def _as_large_as_hybrid(pattern: str) -> ModelConfig:
    """The hybrid with another pattern; the width of its MLPs makes up for what that changes."""
    changed = HYBRID.model_copy(update={"pattern": pattern})
    excess = changed.count_parameters() - HYBRID.count_parameters()
    width = HYBRID.intermediate_size - round(excess / (2 * HYBRID.hidden_size * pattern.count("-")))
    return changed.model_copy(update={"intermediate_size": width})


def measure(arm: str, seed: int, smoke: bool) -> dict[str, Any]:
    """Train one arm from one seed; its losses and accuracies on what is held out, row by row."""
    return train(arm, seed, RATES[arm], max_steps=8 if smoke else STEPS, rows=16 if smoke else HELD_OUT_ROWS)


def train(arm: str, seed: int, rate: float, max_steps: int = STEPS, rows: int = HELD_OUT_ROWS) -> dict[str, Any]:
    """`measure` at any learning rate and length, as development uses it."""
    torch.manual_seed(seed)
    model = Decoder(config(arm))
    loop = LoopConfig(
        max_steps=max_steps, batch_size=BATCH, learning_rate=rate, warmup_steps=max_steps // 16, precision="fp32"
    )
    state, quiz, curve = TrainState(model, adamw(model, loop)), Exam(min(rows, CURVE_ROWS)), []
    for step in steps(state, corpus.batches(seed, BATCH, LENGTH), next_token, loop):
        if step.step % max(1, max_steps // CURVE_POINTS) == 0:
            curve.append(
                [step.step * BATCH * LENGTH, *(float(np.mean(values)) for values in quiz.take(model).values())]
            )
    found = Exam(rows).take(model)
    return {
        "parameters": model.config.count_parameters(),
        "tokens": max_steps * BATCH * LENGTH,
        "learning_rate": rate,
        **{name: float(np.mean(values)) for name, values in found.items()},
        **{f"{name} of rows": np.round(values, 5).tolist() for name, values in found.items()},
        "curve": curve,
    }


class Exam:
    """What is held out: text, key-value recall and copies, the same rows for every arm and seed."""

    def __init__(self, rows: int):
        self.text = corpus.batch_of(corpus.held_out_text(rows, LENGTH))
        self.strings = {
            name: corpus.batch_of(*corpus.held_out_strings(make, rows, LENGTH))
            for name, make in (("recall accuracy", corpus.recall), ("copy accuracy", corpus.copying))
        }

    @torch.no_grad()
    def take(self, model: Decoder) -> dict[str, np.ndarray]:
        """Per row: nats per byte of text, and the share of answers that are right."""
        model.eval()
        logprobs, _ = token_logprobs(model, self.text, temperature=1.0)
        right = {name: _right(model, batch) for name, batch in self.strings.items()}
        return {"text loss": -logprobs.mean(1).double().numpy(), **right}


def _right(model: Decoder, batch: Batch) -> np.ndarray:
    asked = batch["labels"] != IGNORE
    said = model.lm_head(model(batch["input_ids"])).argmax(-1)
    return (((said == batch["labels"]) & asked).sum(1) / asked.sum(1)).double().numpy()


def judge(cells: Cells) -> list[Finding]:
    """Paired by seed and held-out row; losses as a share of the other arm's mean loss at that seed."""
    seeds = sorted({seed for _, seed in cells})

    def difference(arm: str, other: str, name: str, relative: bool) -> Difference:
        pairs = [(cells[arm, seed], cells[other, seed]) for seed in seeds]
        rows = [np.subtract(ours[f"{name} of rows"], theirs[f"{name} of rows"]) for ours, theirs in pairs]
        return two_level_bootstrap(
            [row / (theirs[name] if relative else 1) for row, (_, theirs) in zip(rows, pairs, strict=True)]
        )

    control = two_level_bootstrap(
        [np.subtract(cells["hybrid", seed]["recall accuracy of rows"], CHANCE) for seed in seeds]
    )
    recalls = EXPECTED[1].judged(control)
    learnt = recalls.verdict == "shown"
    against_transformer, against_mamba = (
        difference(*arms, "recall accuracy", relative=False)
        for arms in (("hybrid", "transformer"), ("mamba", "hybrid"))
    )
    return [
        EXPECTED[0].judged(difference("hybrid", "transformer", "text loss", relative=True)),
        recalls,
        EXPECTED[2].judged(against_transformer, telling=learnt),
        EXPECTED[3].judged(against_mamba, telling=learnt),
        EXPECTED[4].judged(difference("hybrid", "hybrid-rope", "text loss", relative=True)),
    ]


def figure(cells: Cells, file: Path) -> None:
    """Text loss and recall accuracy while training."""
    panels = {
        name: {
            arm: [np.array(cell["curve"])[:, [0, column]] for (of, _), cell in cells.items() if of == arm]
            for arm in ARMS
        }
        for column, name in ((1, "text loss, nats per byte"), (2, "recall accuracy"))
    }
    picture.curves(file, panels, "training tokens")


CLAIM = Claim(
    name="hybrid-quality",
    paper="arXiv 2504.03624",
    title="A hybrid learns as well as a Transformer of its size",
    arms=ARMS,
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(900,),
    measure=measure,
    expected=EXPECTED,
    judge=judge,
    limits=LIMITS,
    figure=figure,
    workers=1,
)
