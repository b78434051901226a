"""What the arms of `multi-domain` do to a model: study solutions, practise on a blend of domains, sit exams."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, Literal

import torch

from bloomery import artifact
from bloomery.data.procedural import Problem
from bloomery.data.prompts import Prompt
from bloomery.evaluate.scoring import Answer
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from claims import _multi_domain as world
from claims._multi_domain import GPR, LONGEST, TRANSFER, Manner, Practice

LESSONS = {"math": 4, **dict.fromkeys(GPR, 3), **dict.fromkeys(TRANSFER, 2)}
"""Shares of the lessons before RL, which include the domains that rewards never teach: without any the model would
answer nothing there."""
ONLY_STEPS: Mapping[Manner, float] = {"terse": 1.0}
STRONG = 5 / 8
"""Share of a voter's answers that must agree on another answer for a gold to be called wrong."""
CHANCE = 1 / 4
"""Share of choices that blind guessing gets right."""


@dataclass(frozen=True)
class Diet:
    """What rewards teach from.

    math: its share of the prompts; the other domains share the rest. choice: share of their problems asked as choices.
    gold: what a choice must box, its letter or letter and text. wrong: share of golds that are another answer's.
    """

    math: float = 1 / 3
    choice: float = 1 / 2
    gold: Literal["letter", "letter and text"] = "letter"
    wrong: float = 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Domain → share of the prompts."""
        return {"math": self.math} | dict.fromkeys(GPR, (1 - self.math) / len(GPR))


@dataclass(frozen=True)
class Size:
    """How much of everything: steps of SFT, prompts and batches of RL, items of the exams, answers to each."""

    small: ModelConfig = world.SMALL
    big: ModelConfig = world.BIG
    lessons: int = 20_000
    lookup_steps: int = 450
    sft_steps: int = 1200
    big_sft_steps: int = 900
    mixed_steps: int = 120
    practice: Practice = field(default_factory=Practice)
    pool: dict[str, int] = field(default_factory=lambda: {"math": 480} | dict.fromkeys(GPR, 160))
    items: dict[str, int] = field(
        default_factory=lambda: {"math": 96, "harder": 64} | dict.fromkeys(GPR, 64) | dict.fromkeys(TRANSFER, 48)
    )
    samples: int = 4
    votes: int = 8


FULL = Size()
SMOKE = Size(
    small=world.sized(32), big=world.sized(48), lessons=120, lookup_steps=4, sft_steps=6, big_sft_steps=4,
    mixed_steps=2, practice=Practice(batches=2, num_prompts=6, group_size=2, length=24),
    pool={"math": 12} | dict.fromkeys(GPR, 6), items=dict.fromkeys(("math", "harder", *GPR, *TRANSFER), 4), samples=2,
    votes=2,
)  # fmt: skip


class Cell:
    """One model of one seed, which begins with the weights that arm `after` has left."""

    def __init__(self, arm: str, after: str | None, seed: int, size: Size, folder: Path, big: bool):
        self.arm, self.after, self.seed, self.size, self.folder = arm, after, seed, size, folder
        torch.manual_seed(seed)
        self.model = Decoder(size.big if big else size.small)
        self.big = big
        if after is not None:
            self.load(after)

    def _weights(self, name: str) -> Path:
        return self.folder / "weights" / f"{name}-{self.seed}.pt"

    def save(self) -> None:
        """Leave the weights for later arms."""
        file = self._weights(self.arm)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), file)

    def load(self, name: str) -> None:
        """Take the weights that an arm has left."""
        self.model.load_state_dict(torch.load(self._weights(name), weights_only=True))

    def result(self, arm: str) -> dict[str, Any]:
        """What another arm of this seed has found."""
        return artifact.read_json(self.folder / f"{arm}-{self.seed}.json")["result"]

    def drawn(self, domain: str, what: int, count: int, **settings: Any) -> list[Problem]:
        """Problems of this seed; `what` tells sets apart that are drawn for different ends."""
        return world.problems(domain, 100 * self.seed + what, count, **settings)

    def warm_start(self) -> dict[str, Any]:
        """Solutions with steps, at first half of them lookups; then a mixture of manners, in every domain the same."""
        size, rate = self.size, world.RATE
        steps = size.big_sft_steps if self.big else size.sft_steps
        self._study(0, size.lookup_steps, rate, LESSONS | {"lookups": sum(LESSONS.values())}, ONLY_STEPS)
        self._study(50, steps, rate, LESSONS | {"lookups": 4}, ONLY_STEPS)
        self._study(20, size.mixed_steps, rate / 3, LESSONS, world.MIXTURE)
        return {"tokens of RL": 0, "groups that teach": 0.0}

    def _study(
        self, what: int, steps: int, rate: float, domains: Mapping[str, int], manners: Mapping[Manner, float]
    ) -> None:
        for _ in world.fine_tune(self.model, self._lessons(what, domains, manners), steps, rate, self.seed):
            pass

    def _lessons(self, what: int, domains: Mapping[str, int], manners: Mapping[Manner, float]) -> list[world.Lesson]:
        one = self.size.lessons / sum(domains.values())
        random, found = Random(f"lessons {self.seed} {what}"), []
        for domain, share in domains.items():
            forms = ("open",) if domain == "math" else ("open", "choice")
            for place, form in enumerate(forms):
                for problem in self.drawn(domain, what + 10 * place, round(one * share / len(forms)), form=form):
                    [manner] = random.choices(list(manners), list(manners.values()))
                    found.append((problem, world.solution(problem, manner, with_text=random.random() < 0.5)))
        return found

    def practise(
        self, diet: Diet, again: bool = False, batches: float = 1, without: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Reinforcement learning. again: other prompts first and other samples; batches: share of the usual number;
        without: ids of prompts that are left out."""
        practice = replace(self.size.practice, batches=round(batches * self.size.practice.batches))
        left_out, taught = {*without}, [domain for domain, share in diet.shares.items() if share]
        streams = {domain: [p for p in self.asked(domain, diet) if p.id not in left_out] for domain in taught}
        seed = self.seed + 5000 * again
        asked = world.fed(streams, diet.shares, practice.num_prompts, seed)
        window = max(len(prompt.ids) for prompts in streams.values() for prompt in prompts)
        run = world.Reinforcement(self.model, asked, practice, seed, window)
        run.run()
        keys = ("accuracy", "entropy", "grad_norm", "truncated", "completion_tokens", "active")
        return {
            "tokens of RL": round(sum(row["tokens"] for row in run.curve)),
            "groups that teach": mean(row["active"] for row in run.curve) / practice.num_prompts,
            "curve": [{key: round(row[key], 6) for key in keys} for row in run.curve],
        }

    def asked(self, domain: str, diet: Diet) -> list[Prompt]:
        """The prompts of a domain: the same problems in the same order for every diet."""
        count = self.size.pool[domain]
        opened = self.drawn(domain, 40, count)
        if domain == "math":
            return [_paid(problem, domain, diet, str(int(problem.answer) + 1)) for problem in opened]
        lettered = self.drawn(domain, 40, count, form="choice")
        found = []
        for place, (one, other) in enumerate(zip(opened, lettered, strict=True)):
            as_choice = int((place + 1) * diet.choice) > int(place * diet.choice)
            wrong = next(option for option in other.metadata["options"] if option != one.answer)
            found.append(_paid(other if as_choice else one, domain, diet, wrong))
        return found

    def answers(self, prompts: Sequence[Prompt], samples: int, what: int) -> list[list[Answer]]:
        """`samples` answers to each prompt."""
        return world.exam(self.model, prompts, samples, 1000 * self.seed + what, self.size.practice.length)

    def outvoted(self, diet: Diet) -> list[str]:
        """Prompts where a strong majority of this model's answers agree on another answer than the gold."""
        prompts = [prompt for domain in diet.shares for prompt in self.asked(domain, diet)]
        votes = [Counter(answer.vote for answer in tried) for tried in self.answers(prompts, self.size.votes, 6)]
        least = STRONG * self.size.votes
        return [
            prompt.id
            for prompt, counted in zip(prompts, votes, strict=True)
            if any(count >= least and vote not in ("right", None) for vote, count in counted.items())
        ]

    def solved_once(self, diet: Diet) -> list[str]:
        """Prompts that this model answers rightly at the first try."""
        prompts = [prompt for domain in diet.shares for prompt in self.asked(domain, diet)]
        tried = self.answers(prompts, 1, 7)
        return [prompt.id for prompt, [answer] in zip(prompts, tried, strict=True) if answer.verdict.correct]

    def examined(self) -> dict[str, Any]:
        """Accuracy on held-out problems, by section and item, and how long right answers are."""
        found: dict[str, Any] = {}
        for section, asked in self._exam().items():
            found |= _graded(section, self.answers(asked, self.size.samples, 9))
        return found

    def _exam(self) -> dict[str, list[Prompt]]:
        """Section → its held-out prompts: the same for every arm of this seed."""
        parts = {"math": ("math",), "open": GPR, "choice": GPR, "transfer": TRANSFER, "harder": ("harder",)}
        return {
            section: [
                world.as_graded(problem, domain)
                for domain in domains
                for problem in self.drawn(
                    domain, 30, self.size.items[domain], split="test", form="choice" if section == "choice" else "open"
                )
            ]
            for section, domains in parts.items()
        }


def _paid(problem: Problem, domain: str, diet: Diet, wrong: str) -> Prompt:
    """A prompt of a diet: what its golds are, right or not."""
    prompt = world.as_prompt(problem, domain)
    if prompt.options and diet.gold == "letter and text":
        return replace(prompt, answer=world.long_label(problem), verifier="exact")
    if not prompt.options and Random(f"wrong gold {problem.id}").random() < diet.wrong:
        return replace(prompt, answer=wrong)
    return prompt


def _graded(section: str, answered: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Numbers of a section: shares of right answers, of answers with steps, and tokens of the right ones."""
    right = [[answer.tokens for answer in answers if answer.verdict.correct] for answers in answered]
    shares = [len(tokens) / len(answers) for tokens, answers in zip(right, answered, strict=True)]
    texts = [answer.completion.text or "" for answers in answered for answer in answers]
    found: dict[str, Any] = {section: mean(shares)}
    if section == "choice":
        found["choice, over chance"] = mean(shares) - CHANCE
    if section in ("math", "open"):
        lengths = [count for tokens in right for count in tokens]
        found[f"{section}: tokens of a right answer"] = mean(lengths) if lengths else float(LONGEST)
        found[f"{section}: answers with steps"] = mean("<think>?</think>" not in text for text in texts)
    by_domain: dict[str, list[float]] = {}
    for answers, share in zip(answered, shares, strict=True):
        by_domain.setdefault(answers[0].prompt.domain, []).append(share)
    return found | {
        f"{section} of items": shares, f"{section} by domain": {name: mean(of) for name, of in by_domain.items()},
        f"{section}: tokens of items": [round(mean(tokens), 3) if tokens else None for tokens in right],
    }  # fmt: skip


def vote_and_practise(cell: Cell, diet: Diet) -> dict[str, Any]:
    """From the start, without the prompts on which the model that learnt with the wrong golds outvotes them."""
    out = cell.outvoted(diet)
    wrong = {p.id for d in diet.shares for p in cell.asked(d, diet)} & _ids_of_wrong(cell, diet)
    cell.load("sft")
    caught = len(wrong & {*out})
    return cell.practise(diet, without=out) | {
        "golds dropped": len(out), "wrong golds dropped": caught, "wrong golds": len(wrong),
    }  # fmt: skip


def _ids_of_wrong(cell: Cell, diet: Diet) -> set[str]:
    right = {p.id: p.answer for d in diet.shares for p in cell.asked(d, replace(diet, wrong=0.0))}
    return {p.id for d in diet.shares for p in cell.asked(d, diet) if p.answer != right[p.id]}


def fail_list(cell: Cell, diet: Diet) -> dict[str, Any]:
    """What the small model solves at the first try, for the bigger one's filter."""
    return {"solved at once": cell.solved_once(diet)}


def hard_only(cell: Cell, diet: Diet) -> dict[str, Any]:
    """The bigger model on what the small one fails."""
    solved = cell.result("sft")["solved at once"]
    return cell.practise(diet, without=solved) | {"prompts left out": len(solved)}


def as_many_at_random(cell: Cell, diet: Diet) -> dict[str, Any]:
    """The bigger model on as many prompts of each domain, drawn blindly."""
    solved, out = {*cell.result("sft")["solved at once"]}, []
    for domain in diet.shares:
        ids = [prompt.id for prompt in cell.asked(domain, diet)]
        count = len(solved & {*ids})
        out += Random(f"subset {cell.seed} {domain}").sample(ids, count)
    return cell.practise(diet, without=out) | {"prompts left out": len(out)}
