"""A small world of five domains that rewards teach and two that they never do, and a model that answers in it.

Nemotron-CrossThink in miniature (arXiv 2504.13941): everything needed stands in the prompt, since a model of this size
knows nothing; each problem beyond math exists in an open form and as a choice of four with the same id. A word of the
problems is a token, other symbols are one each.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from string import ascii_lowercase, digits
from typing import Any, Literal

import numpy as np
import torch

from bloomery.data.chat import Examples
from bloomery.data.loader import ExampleRows
from bloomery.data.loader import batches as rows_in_order
from bloomery.data.pack import Batch
from bloomery.data.permutation import key, permute
from bloomery.data.procedural import Problem, generate
from bloomery.data.procedural.dates import DAYS, MONTHS
from bloomery.data.procedural.facts import GOODS, NAMES
from bloomery.data.procedural.logic import DEEDS, VERDICTS
from bloomery.data.procedural.problem import Split
from bloomery.data.procedural.relational import KIN
from bloomery.data.procedural.schedule import COURSES
from bloomery.data.prompt_blend import Systematic, interleaved
from bloomery.data.prompts import Prompt
from bloomery.evaluate.scoring import Answer, answer_all
from bloomery.generate import Engine, SamplingParams
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.posttrain.batches import micro_batches
from bloomery.posttrain.policy import PolicyGradient
from bloomery.posttrain.rollouts import roll_out
from bloomery.train.loop import LoopConfig, Step, TrainState, steps
from bloomery.train.losses import next_token
from bloomery.train.optim import adamw
from bloomery.verify import Verdict
from bloomery.verify.reward import Reward, form_of
from bloomery.verify.verifiers import lookup

PAD, END, ASK = 0, 1, 2
MARKS = ("<think>", "</think>", "\\boxed{", ". ", ": ", ") ")
SAID = "before after first last next of is needs done gets most least hard mild who lies true we differ agree both lie"
WORDS = (*f"{SAID} none no yes reverse count sort in".split(), *NAMES, *GOODS, *VERDICTS, *DEEDS, *KIN, *DAYS, *MONTHS,
         *COURSES)  # fmt: skip
SYMBOLS = sorted({*ascii_lowercase, *digits, *"ABCD+-*/=();.?}|~ \n"})
TOKENS = ("", "", "", *MARKS, *WORDS, *SYMBOLS)
_IDS = {text: number for number, text in enumerate(TOKENS) if text}
_PIECE = re.compile("|".join(map(re.escape, MARKS)) + rf"|\b(?:{'|'.join(WORDS)})\b|.", re.DOTALL)
ROW, LONGEST = 256, 64


def sized(width: int) -> ModelConfig:
    """A hybrid of one Mamba-2 and one attention block: its short convolution finds what stood before a word, which
    attention alone takes thousands of steps to learn."""
    return ModelConfig(
        family="nemotron_h", pattern="M*-*-", vocab_size=len(TOKENS), hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16, num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4,
        rope=RopeConfig(), mamba_num_heads=width // 16, mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=32,
        tie_word_embeddings=True, initializer_range=0.1, max_position_embeddings=ROW, pad_token_id=PAD,
        eos_token_id=END,
    )  # fmt: skip


SMALL, BIG = sized(96), sized(160)
RATE = 3e-3
"""Of supervised learning, at its highest."""

Manner = Literal["direct", "terse", "verbose"]
MIXTURE: Mapping[Manner, float] = {"direct": 0.5, "terse": 0.25, "verbose": 0.25}
"""How answers are written at the start of RL, in every domain alike: without steps, with them, with them twice."""
GPR = ("logic", "relational", "text", "table")
TRANSFER = ("dates", "schedule")
Sources = tuple[tuple[str, Mapping[str, Any], float], ...]
SOURCES: dict[str, Sources] = {
    "lookups": (("verdict", {"people": 1, "deeds": 1}, 1.0),),
    "math": (("chain", {"max_operand": 9, "max_factor": 5, "max_result": 40}, 1.0),),
    "logic": (("verdict", {}, 0.6), ("knights", {}, 0.4)),
    "relational": (("family", {}, 0.5), ("order", {}, 0.5)),
    "text": (("strings", {"operations": ("reverse", "count"), "min_length": 4, "max_length": 4}, 1.0),),
    "table": (("table", {"rows": 4, "columns": 3, "max_value": 10, "questions": ("most", "least", "after")}, 1.0),),
    "dates": (("calendar", {"max_days": 7}, 1.0),),
    "schedule": (("schedule", {}, 1.0),),
    "harder": (
        ("verdict", {"people": 3, "deeds": 3}, 0.25), ("order", {"people": 5}, 0.25),
        ("strings", {"operations": ("reverse", "count"), "min_length": 5, "max_length": 5}, 0.25),
        ("table", {"rows": 5, "columns": 3, "max_value": 10, "questions": ("most", "least")}, 0.25),
    ),
}  # fmt: skip
"""Domain → its tasks, their settings and shares. Lookups are the first lessons, harder problems are for exams alone."""
_AT_ONCE = {"train": 300, "test": 32}
"""Problems asked of a task at once: fewer than it holds; more come from further seeds."""


def encode(text: str) -> list[int]:
    """Token ids; the space between two words, or a word and a number or letter, has none."""
    pieces = _PIECE.findall(text)
    around = zip(["", *pieces], pieces, [*pieces[1:], ""], strict=False)
    return [_IDS[piece] for before, piece, after in around if not (piece == " " and _touch(before, after))]


def decode(ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of token ids; what marks beginnings and ends has none."""
    text, before = "", ""
    for number in ids:
        piece = TOKENS[number]
        text += f" {piece}" if _touch(before, piece) else piece
        before = piece
    return text


def _touch(before: str, after: str) -> bool:
    """Whether two pieces are always apart by a space: both are letters or digits, and one is a word."""
    return before.isalnum() and after.isalnum() and (before in _IS_WORD or after in _IS_WORD)


_IS_WORD = frozenset(WORDS)


def problems(domain: str, seed: int, count: int, form: str = "open", split: Split = "train") -> list[Problem]:
    """`count` problems of a domain in one form, all with their steps; the same seed gives the same in both forms."""
    found: list[Problem] = []
    for task, options, share in SOURCES[domain]:
        wanted, most = round(count * share), _AT_ONCE[split]
        formed = options | ({} if domain == "math" else {"form": form})
        for start in range(0, wanted, most):
            part = min(most, wanted - start)
            source = {"seed": 1000 * seed + start // most, "count": part, "split": split, "style": {"stepwise": 1}}
            found += generate(task, **source, **formed)
    return found


def solution(problem: Problem, manner: Manner, with_text: bool = False) -> str:
    """A worked answer; with_text: a choice is boxed with the option's text behind its letter."""
    steps, _, final = problem.solution.partition("\n")
    thought = {"direct": "?", "terse": steps, "verbose": f"{steps}|{steps}"}[manner]
    if with_text and "options" in problem.metadata:
        final = rf"\boxed{{{long_label(problem)}}}"
    return f"<think>{thought}</think>{final}"


def long_label(problem: Problem) -> str:
    """The right option as a choice shows it."""
    return f"{problem.answer}) {problem.metadata['answer_text']}"


def as_prompt(problem: Problem, domain: str) -> Prompt:
    """The problem as what the model is asked; of a choice the letter alone is right."""
    options = problem.metadata.get("options", ())
    answer, verifier = problem.answer, "short" if problem.verifier == "exact" else problem.verifier
    if options:
        answer, verifier = json.dumps({"label": problem.answer, "options": len(options)}), "label"
    return Prompt(
        problem.id, domain, ({"role": "user", "content": problem.question},), answer, verifier,
        (*encode(problem.question), ASK), domain, problem.metadata.get("form", "open"), len(options),
    )  # fmt: skip


def as_graded(problem: Problem, domain: str) -> Prompt:
    """The problem as exams ask it: of a choice the letter counts, with its text behind it or without."""
    prompt = as_prompt(problem, domain)
    return replace(prompt, answer=long_label(problem)) if prompt.options else prompt


Lesson = tuple[Problem, str]
"""A problem and the solution to learn."""


def fine_tune(model: Decoder, lessons: Sequence[Lesson], count: int, rate: float, seed: int) -> Iterator[Step]:
    """`count` steps of supervised learning on the solutions, 8 packed rows a step; the rate falls to nothing."""
    loop = LoopConfig(
        max_steps=count, batch_size=8, learning_rate=rate, warmup_steps=count // 20, schedule="cosine", min_ratio=0.0,
        precision="fp32",
    )  # fmt: skip
    rows = ExampleRows(_examples(lessons), ROW, seed, PAD)
    yield from steps(TrainState(model, adamw(model, loop)), rows_in_order(rows, 0, 8, 8), next_token, loop)


def _examples(lessons: Sequence[Lesson]) -> Examples:
    both = [([*encode(problem.question), ASK], [*encode(text), END]) for problem, text in lessons]
    learnt = [np.repeat([False, True], [len(question), len(text)]) for question, text in both]
    ids = [np.array(question + text, np.int32) for question, text in both]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in ids])])
    return Examples(np.concatenate(ids), np.concatenate(learnt), offsets, np.zeros(len(ids), np.int16), ("problems",))


class Strict:
    """Pays for a right answer in the right form alone, R = R_acc and R_format; all verdicts here are immediate."""

    def submit(self, verifier: str, completion: str, answer: str) -> "Future[Verdict]":
        """The verdict on the answer, spoilt where the form is not kept."""
        accuracy = lookup(verifier)(completion, answer, True)
        done: Future[Verdict] = Future()
        done.set_result(Reward().of(accuracy, form_of(completion, require_think=True)))
        return done


def fed(
    streams: Mapping[str, Sequence[Prompt]], shares: Mapping[str, float], count: int, seed: int
) -> Iterator[list[Prompt]]:
    """Batches without end: `count` prompts in the shares of their domains, exactly; every domain in an order of its
    own, again when it is used up."""
    names = [name for name, share in shares.items() if share]
    assert all(streams[name] for name in names), "a domain of the blend without prompts"
    plan = Systematic(np.array([shares[name] for name in names]) / sum(shares.values()), count, seed)
    endless = [_endless(streams[name], seed, name) for name in names]
    for step in itertools.count():
        yield [next(endless[cell]) for cell in interleaved(plan.counts(step).tolist())]


def _endless(prompts: Sequence[Prompt], seed: int, name: str) -> Iterator[Prompt]:
    for epoch in itertools.count():
        order = permute(np.arange(len(prompts)), len(prompts), key(seed, name, np.array(epoch)))
        yield from (prompts[place] for place in order.tolist())


@dataclass(frozen=True)
class Practice:
    """How a model learns by reinforcement: `batches` of `num_prompts` × `group_size` answers, one step each."""

    batches: int = 30
    rate: float = 3e-4
    num_prompts: int = 24
    group_size: int = 8
    length: int = LONGEST


LARGEST_GAP = 0.001
"""Nats a token between trainer and generator, at most: one model computed in two ways."""


class Reinforcement:
    """One run of reinforcement learning. `curve` holds the numbers of each batch of rollouts."""

    def __init__(self, model: Decoder, asked: Iterator[list[Prompt]], practice: Practice, seed: int, window: int):
        self.model, self.asked, self.practice, self.seed = model, asked, practice, seed
        rows = practice.num_prompts * practice.group_size
        self.engine = Engine(model, rows, window + practice.length, decode=decode)
        self.objective = PolicyGradient(1.0, max_logprob_gap=LARGEST_GAP)
        self.curve: list[dict[str, float]] = []

    def run(self) -> None:
        """Train to the end."""
        batches = self.practice.batches
        loop = LoopConfig(
            max_steps=batches, batch_size=1, learning_rate=self.practice.rate, warmup_steps=min(5, batches),
            schedule="constant", weight_decay=0.0, precision="fp32",
        )  # fmt: skip
        for step in steps(TrainState(self.model, adamw(self.model, loop)), self._batches(), self.objective, loop):
            self.curve[-1] |= {"entropy": step.metrics["entropy"], "grad_norm": step.grad_norm}

    def _batches(self) -> Iterator[list[Batch]]:
        practice = self.practice
        params = SamplingParams(max_new_tokens=practice.length, stop_token_ids=(END,))
        for number, prompts in enumerate(self.asked):
            self.engine.sync()
            rollouts = roll_out(self.engine, Strict(), prompts, practice.group_size, params, (self.seed, number))
            teaches = rollouts.mixed()  # if none does, a step without gradient
            self.curve.append(rollouts.metrics() | {"tokens": int(rollouts.lengths.sum()), "active": len(teaches)})
            self.objective.begin({}, 1.0)
            yield micro_batches(
                rollouts, len(rollouts.samples), PAD, "token_mean", practice.length, keep_all=not teaches
            )


@torch.no_grad()
def exam(model: Decoder, asked: Sequence[Prompt], samples: int, seed: int, length: int = LONGEST) -> list[list[Answer]]:
    """`samples` answers to each prompt, judged."""
    model.eval()
    engine = Engine(model, 256, max(len(prompt.ids) for prompt in asked) + length, decode=decode)
    params = SamplingParams(max_new_tokens=length, stop_token_ids=(END,), logprobs=False)
    return answer_all(engine, Strict(), asked, samples, params, seed)  # type: ignore[arg-type]
