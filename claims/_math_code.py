"""A small world of math and code: problems, a model of a third of a million parameters, and what is done to it.

Math are chains of whole-number arithmetic, code is a Python function told by two of its values. Both share arithmetic
steps and nothing else (AceReason-Nemotron in miniature, arXiv 2505.16400). A symbol is a token; a few phrases are one.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase, digits
from typing import Any

import numpy as np
import torch

from bloomery.data.chat import Examples
from bloomery.data.loader import ExampleRows
from bloomery.data.loader import batches as rows_in_order
from bloomery.data.pack import Batch
from bloomery.data.permutation import key, permute
from bloomery.data.procedural import Problem, generate
from bloomery.data.procedural.problem import Split
from bloomery.data.prompts import Prompt
from bloomery.evaluate.scoring import Answer, answer_all
from bloomery.generate import Engine, SamplingParams
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.posttrain.batches import micro_batches
from bloomery.posttrain.policy import PolicyGradient
from bloomery.posttrain.rl_config import Clip, Overlong
from bloomery.posttrain.rollouts import Judge, Rollouts, roll_out
from bloomery.train.loop import LoopConfig, Step, TrainState, steps
from bloomery.train.losses import next_token
from bloomery.train.optim import adamw
from bloomery.verify import Pool, Verdict

PAD, END, ASK = 0, 1, 2
PHRASES = ("\\boxed{", "```python\ndef f(", "):\n    return ", "\n```", ", f linear. Write f(x).")
SYMBOLS = sorted({*ascii_lowercase, *digits, *"+-*/%=<>()[]{}:;,.'`\\\n WSTL_?"})
TOKENS = ("", "", "", *PHRASES, *SYMBOLS)
_IDS = {text: number for number, text in enumerate(TOKENS) if text}
_PIECE = re.compile("|".join(map(re.escape, PHRASES)) + "|.", re.DOTALL)
_STEP = re.compile(r"(-?\d+)([-+*/])(\d+)=(-?\d+)")

ROW = 256
MODEL = ModelConfig(
    family="llama", pattern="*-*-*-", vocab_size=len(TOKENS), hidden_size=96, intermediate_size=256, mlp_gated=True,
    mlp_hidden_act="silu", num_attention_heads=4, num_key_value_heads=4, head_dim=24, rope=RopeConfig(),
    tie_word_embeddings=True, initializer_range=0.1, max_position_embeddings=ROW, pad_token_id=PAD, eos_token_id=END,
)  # fmt: skip
_CHAIN = {"operators": "+-*/", "max_operand": 20, "max_result": 99, "max_factor": 9}
_LINEAR = {"kinds": ("linear",), "max_slope": 9, "max_constant": 60, "cases": 4}
_DESCRIBED = {"kinds": ("numbers", "lists", "strings"), "max_constant": 40, "cases": 6}
SOURCES: dict[str, tuple[tuple[str, Mapping[str, Any], float], ...]] = {
    "math": (("chain", _CHAIN, 1.0),),
    "long chains": (("chain", _CHAIN | {"min_ops": 5, "max_ops": 5}, 1.0),),
    "code": (("program", _LINEAR, 0.75), ("program", _DESCRIBED, 0.25)),
    "words": (("strings", {"operations": ("reverse",)}, 1.0),),
}
"""Domain → its tasks, their settings and shares."""
_FORMS = {"train": 300, "test": 32}
"""Problems asked of a task at once: fewer than it holds; more come from further seeds, the same function told anew."""
LARGEST_GAP = 0.001
"""Nats a token between trainer and generator, at most: one model computed in two ways."""


def encode(text: str) -> list[int]:
    """Token ids of a text; every symbol of the problems has one."""
    return [_IDS[piece] for piece in _PIECE.findall(text)]


def decode(ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of token ids; what marks beginnings and ends has none."""
    return "".join(TOKENS[number] for number in ids)


def problems(
    domain: str, seed: int, count: int, split: Split = "train", stepwise: float = 1.0
) -> list[Problem]:  # fmt: skip
    """`count` problems of a domain; this share of the solutions show their steps."""
    style = {"direct": 1 - stepwise, "stepwise": stepwise}
    found: list[Problem] = []
    for task, options, share in SOURCES[domain]:
        wanted, most = round(count * share), _FORMS[split]
        for start in range(0, wanted, most):
            part = min(most, wanted - start)
            found += generate(task, seed=1000 * seed + start // most, count=part, split=split, style=style, **options)
    return found


def prompts(drawn: Sequence[Problem]) -> list[Prompt]:
    """The problems as what the model is asked."""
    return [
        Prompt(
            f"{p.id}", p.metadata.get("kind", p.metadata["task"]), ({"role": "user", "content": p.question},), p.answer,
            p.verifier, (*encode(p.question), ASK),
        )
        for p in drawn
    ]  # fmt: skip


def fine_tune(model: Decoder, drawn: Sequence[Problem], count: int, rate: float, seed: int) -> Iterator[Step]:
    """`count` steps of supervised learning on the solutions, 8 packed rows a step; the rate falls to nothing."""
    loop = LoopConfig(
        max_steps=count, batch_size=8, learning_rate=rate, warmup_steps=count // 20, schedule="cosine", min_ratio=0.0,
        precision="fp32",
    )  # fmt: skip
    rows = ExampleRows(_examples(drawn), ROW, seed, PAD)
    yield from steps(TrainState(model, adamw(model, loop)), rows_in_order(rows, 0, 8, 8), next_token, loop)


def _examples(drawn: Sequence[Problem]) -> Examples:
    asked = [[*encode(problem.question), ASK] for problem in drawn]
    answered = [[*encode(problem.solution), END] for problem in drawn]
    both = list(zip(asked, answered, strict=True))
    learnt = [np.repeat([False, True], [len(question), len(solution)]) for question, solution in both]
    ids = [np.array(question + solution, np.int32) for question, solution in both]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in ids])])
    return Examples(np.concatenate(ids), np.concatenate(learnt), offsets, np.zeros(len(ids), np.int16), ("problems",))


class Coin:
    """Pays by chance: the control that tells what rewards teach from what training does anyway."""

    def __init__(self, seed: int):
        self._random = Random(f"coin {seed}")

    def submit(self, verifier: str, completion: str, answer: str) -> "Future[Verdict]":
        """Right or wrong, each in half of the cases."""
        done: Future[Verdict] = Future()
        done.set_result(Verdict.of(self._random.choice(("correct", "wrong"))))
        return done


@dataclass(frozen=True)
class Practice:
    """How a model learns by reinforcement: as the paper does, unless said otherwise.

    batches: of `num_prompts` × `group_size` completions; tokens: or as many batches as write so many tokens.
    lengths: longest completions, each for an equal share of that. updates: optimizer steps on a batch, each on its own
    part of it; clip: PPO's bounds for them. skip_truncated: completions that were cut off are not learnt.
    """

    batches: int = 60
    tokens: int | None = None
    rate: float = 2e-4
    num_prompts: int = 32
    group_size: int = 8
    lengths: tuple[int, ...] = (72,)
    updates: int = 1
    clip: Clip | None = None
    skip_truncated: bool = False


class Reinforcement:
    """One run of reinforcement learning. `curve` holds the numbers of each batch of rollouts."""

    def __init__(self, model: Decoder, asked: Sequence[Prompt], judge: Judge, practice: Practice, seed: int):
        self.model, self.asked, self.judge, self.practice, self.seed = model, asked, judge, practice, seed
        window = max(len(prompt.ids) for prompt in asked) + max(practice.lengths)
        self.engine = Engine(model, practice.num_prompts * practice.group_size, window, decode=decode)
        self.objective = PolicyGradient(1.0, max_logprob_gap=LARGEST_GAP, clip=practice.clip)
        self.curve: list[dict[str, float]] = []
        self.tokens = self.drawn = 0

    def run(self) -> Iterator[int]:
        """Train to the end; the number of each batch as soon as it is learnt."""
        practice = self.practice
        loop = LoopConfig(
            max_steps=1_000_000, batch_size=1, learning_rate=practice.rate, warmup_steps=10, schedule="constant",
            weight_decay=0.0, precision="fp32",
        )  # fmt: skip
        for step in steps(TrainState(self.model, adamw(self.model, loop)), self._batches(), self.objective, loop):
            row = self.curve[-1]
            row["entropy"] = step.metrics["entropy"]
            row["grad_norm"] = max(step.grad_norm, row.get("grad_norm", 0.0))
            row["gap"] = max(self.objective.largest_gap, row.get("gap", 0.0))
            if step.step % practice.updates == 0:
                yield len(self.curve)
                if self._done() >= 1:
                    return

    def _done(self) -> float:
        """Which share of the run is over."""
        practice = self.practice
        return self.tokens / practice.tokens if practice.tokens else len(self.curve) / practice.batches

    def _batches(self) -> Iterator[list[Batch]]:
        practice = self.practice
        while True:
            length = practice.lengths[int(self._done() * len(practice.lengths))]
            rollouts = self._roll_out(length)
            for number in range(practice.updates):
                part = Rollouts(rollouts.groups[number :: practice.updates])
                teaches = bool(part.mixed(practice.skip_truncated))  # if not, a step without gradient
                batches = micro_batches(
                    part, practice.num_prompts * practice.group_size, PAD, "token_mean", length, keep_all=not teaches,
                    overlong=Overlong(filter=teaches and practice.skip_truncated),
                )  # fmt: skip
                if practice.clip is not None:
                    for batch in batches:  # the trainer's own before any update: equal up to LARGEST_GAP
                        batch["old_logprobs"] = batch["generator_logprobs"]
                self.objective.begin({}, 1.0)
                yield batches

    def _roll_out(self, length: int) -> Rollouts:
        """The next prompts, answered by the weights of now."""
        practice, params = self.practice, SamplingParams(max_new_tokens=length, stop_token_ids=(END,))
        epochs, slots = np.divmod(np.arange(self.drawn, self.drawn + practice.num_prompts), len(self.asked))
        order = permute(slots, len(self.asked), key(self.seed, "prompts", epochs))
        chosen = [self.asked[place] for place in order.tolist()]
        self.engine.sync()
        rollouts = roll_out(self.engine, self.judge, chosen, practice.group_size, params, (self.seed, self.drawn))
        self.drawn += len(chosen)
        self.tokens += int(rollouts.lengths.sum())
        self.curve.append(rollouts.metrics() | {"tokens": self.tokens})
        return rollouts


@torch.no_grad()
def exam(
    model: Decoder, drawn: Sequence[Problem], samples: int, pool: Pool, seed: int, length: int = 72
) -> list[list[Answer]]:
    """`samples` answers to each problem, judged."""
    asked = prompts(drawn)
    model.eval()
    engine = Engine(model, 256, max(len(prompt.ids) for prompt in asked) + length, decode=decode)
    params = SamplingParams(max_new_tokens=length, stop_token_ids=(END,), logprobs=False)
    return answer_all(engine, pool, asked, samples, params, seed)


def shares(answered: Sequence[Sequence[Answer]]) -> list[float]:
    """The share of right answers to each problem."""
    return [sum(answer.verdict.correct for answer in answers) / len(answers) for answers in answered]


def how(answered: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Shares of all answers: right; wrong for want of a form, of steps, or of arithmetic; right by wrong steps."""
    counts: Counter[str] = Counter(_kind(answer) for answers in answered for answer in answers)
    total = counts.total()
    kinds = ("right", "right by wrong steps", "no answer", "wrong without steps", "wrong with steps")
    return {kind: counts[kind] / total for kind in kinds}


def _kind(answer: Answer) -> str:
    text = answer.completion.text or ""
    found = _STEP.findall(text)
    if answer.verdict.correct:
        return "right" if all(_holds(*step) for step in found) else "right by wrong steps"
    if answer.verdict.status not in ("wrong", "timeout") or not ("return" in text or "boxed" in text):
        return "no answer"
    return "wrong with steps" if found else "wrong without steps"


def _holds(left: str, operator: str, right: str, result: str) -> bool:
    a, b, c = int(left), int(right), int(result)
    if operator == "/":
        return b != 0 and a == b * c
    return {"+": a + b, "-": a - b, "*": a * b}[operator] == c
