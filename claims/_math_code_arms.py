"""What the arms of `math-then-code` do to a model: study solutions, practise with rewards, sit exams."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, Self

import torch

from bloomery import artifact
from bloomery.data.procedural import Problem
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.posttrain.rollouts import Judge
from bloomery.verify import Pool
from claims import _math_code as world
from claims._math_code import Coin, Practice, Reinforcement

RATE = 2e-4
MIXTURE = 0.4
"""Share of the solutions that show their steps, in the mixture before RL."""
SHARES = {"math": 4, "code": 4, "words": 1}
"""Problems of a domain in lessons of several."""
LENGTHS = (20, 30, 40)
LONGEST = 72
HARD = 6 / 16
"""Pass rate up to which a prompt is hard (arXiv 2505.16400, table 4)."""
FORK_AFTER = 20
"""Batches of math RL after which more updates a batch are tried: the choice between styles is made by then."""


@dataclass(frozen=True)
class Size:
    """How much of everything: steps of SFT, batches of RL, problems and samples. `puzzles` are tried `tries` times; of
    those that stay unsolved, `again` new tries are made."""

    model: ModelConfig = world.MODEL
    problems: int = 9000
    stepwise_steps: int = 1800
    mixed_steps: int = 150
    sft_steps: int = 200
    batches: dict[str, int] = field(default_factory=lambda: {"math": 60, "words": 60, "code": 40})
    late_batches: int = 40
    length_tokens: int = 240_000
    prompts: int = 1000
    num_prompts: int = 32
    group_size: int = 8
    items: dict[str, int] = field(default_factory=lambda: {"math": 256, "code": 128})
    samples: int = 8
    rated: int = 400
    puzzles: int = 96
    tries: int = 128
    again: int = 256


FULL = Size()
SMOKE = Size(
    model=world.MODEL.model_copy(update={"pattern": "*-", "hidden_size": 48, "intermediate_size": 128, "head_dim": 12}),
    problems=60, stepwise_steps=10, mixed_steps=2, sft_steps=2, batches=dict.fromkeys(("math", "words", "code"), 2),
    late_batches=1, length_tokens=300, prompts=20, num_prompts=8, group_size=2, items={"math": 4, "code": 4}, samples=2,
    rated=4, puzzles=4, tries=2, again=2,
)  # fmt: skip


class Cell:
    """One model of one seed. Use as `with Cell(...) as cell:`; it begins with the weights that arm `after` has left."""

    def __init__(self, arm: str, after: str | None, seed: int, size: Size, folder: Path):
        self.arm, self.after, self.seed, self.size, self.folder = arm, after, seed, size, folder
        self.coin = Coin(seed)
        torch.manual_seed(seed)
        self.model = Decoder(size.model)
        if after is not None:
            self.load(after)

    def __enter__(self) -> Self:
        self.pool = Pool(workers=1 if self.size is SMOKE else 2)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def _weights(self, name: str) -> Path:
        return self.folder / "weights" / f"{name}-{self.seed}.pt"

    def save(self, name: str) -> None:
        """Leave the weights for later arms."""
        file = self._weights(name)
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

    def study(
        self, domains: Sequence[str], stepwise: float, steps: int | None = None, rate: float = 5e-4, what: int = 1,
        change: Callable[[list[Problem]], list[Problem]] = list, until: Callable[[int], bool] = lambda step: False,
    ) -> dict[str, Any]:  # fmt: skip
        """Learn from solutions, for `steps` or until `until(step)` says so."""
        one = self.size.problems / sum(SHARES[domain] for domain in domains)
        parts = [self.drawn(domain, what, round(one * SHARES[domain]), stepwise=stepwise) for domain in domains]
        lessons = change([problem for part in parts for problem in part])
        for step in world.fine_tune(self.model, lessons, steps or self.size.sft_steps, rate, self.seed):
            if until(step.step):
                break
        return {"steps of sft": step.step}

    def practise(
        self, domain: str, judge: Judge | None = None, start: str | None = None, late: bool = False,
        hard: bool = False, change: Callable[[list[Problem]], list[Problem]] = list,
        at_batch: Callable[[int], None] = lambda number: None, lengths: tuple[int, ...] = (), **changes: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Reinforcement learning; returns its curve. late: a second run on math, with prompts of its own."""
        if start is not None:
            self.load(start)
        size, batches = self.size, self.size.late_batches if late else self.size.batches[domain]
        problems = change(self.drawn(domain, 3 if late else 2, size.prompts))
        practice = Practice(
            batches=batches, tokens=size.length_tokens if lengths else None, rate=RATE, num_prompts=size.num_prompts,
            group_size=size.group_size, lengths=lengths or (LONGEST,),
        )  # fmt: skip
        asked = world.prompts(self._hard(problems) if hard else problems)
        run = Reinforcement(self.model, asked, judge or self.pool, replace(practice, **changes), self.seed)
        for number in run.run():
            at_batch(number)
        keys = ("accuracy", "entropy", "grad_norm", "truncated", "completion_tokens", "tokens", "gap")
        return {"curve": [{key: round(row[key], 6) for key in keys} for row in run.curve]}

    def _hard(self, problems: list[Problem]) -> list[Problem]:
        rates = self.accuracy(problems[: self.size.rated], 16, 5)
        return [p for p, rate in zip(problems, rates, strict=False) if rate <= HARD] or problems

    def accuracy(self, problems: Sequence[Problem], samples: int, what: int) -> list[float]:
        """The share of right answers to each; samples for different ends are drawn apart."""
        return world.shares(world.exam(self.model, problems, samples, self.pool, what, LONGEST))

    def examined(self) -> dict[str, Any]:
        """Accuracy on held-out problems, by item and by kind of answer."""
        found: dict[str, Any] = {}
        for domain, count in self.size.items.items():
            answered = world.exam(self.model, self.exam(domain, count), self.size.samples, self.pool, 9, LONGEST)
            right = world.shares(answered)
            tokens = mean(answer.tokens for answers in answered for answer in answers)
            found |= {domain: mean(right), f"{domain}: tokens an answer": tokens}
            found |= {f"{domain} of items": right, f"{domain} by kind": world.how(answered)}
        return found

    def exam(self, domain: str, count: int) -> list[Problem]:
        """The held-out problems of this seed: the same for every arm."""
        return self.drawn(domain, 9, count, split="test")


def warm_start(cell: Cell) -> dict[str, Any]:
    """Solutions with steps, then a mixture; and which long chains it never solves."""
    size, domains = cell.size, ("math", "code", "words")
    cell.study(domains, 1.0, size.stepwise_steps, rate=3e-3, what=0)
    cell.study(domains, MIXTURE, size.mixed_steps, rate=1e-3)
    puzzles = cell.exam("long chains", size.puzzles)
    rates = cell.accuracy(puzzles, size.tries, 6)
    unsolved = [number for number, rate in enumerate(rates) if not rate]
    again = _right(cell, [puzzles[number] for number in unsolved])
    return {"long chains solved": 1 - len(unsolved) / len(puzzles), "unsolved": unsolved,
            "puzzles right again": again, "tries again": size.again}  # fmt: skip


def _right(cell: Cell, puzzles: Sequence[Problem]) -> list[int]:
    rates = cell.accuracy(puzzles, cell.size.again, 7) if puzzles else []
    return [round(rate * cell.size.again) for rate in rates]


def math_first(cell: Cell) -> dict[str, Any]:
    """Math RL, its weights on the way, the unsolved long chains, and which held-out problems it leaves hard."""
    fork = min(FORK_AFTER, cell.size.batches["math"])
    found = cell.practise("math", at_batch=lambda number: cell.save("math-fork") if number == fork else None)
    puzzles, unsolved = cell.exam("long chains", cell.size.puzzles), cell.result("sft")["unsolved"]
    rates = cell.accuracy(cell.exam("math", cell.size.items["math"]), 16, 8)
    hard = [number for number, rate in enumerate(rates) if rate <= HARD]
    return found | {"puzzles right": _right(cell, [puzzles[n] for n in unsolved]), "hard items": hard}


def study_until_equal(cell: Cell) -> dict[str, Any]:
    """Solutions of math alone, with steps, from the start of math RL until as much of new math is right as after it."""
    problems = cell.drawn("math", 4, 2 * cell.size.num_prompts)
    wanted = mean(cell.accuracy(problems, 8, 4))
    cell.load("sft")

    def equal(step: int) -> bool:
        return step % 10 == 0 and mean(cell.accuracy(problems, 8, 4)) >= wanted

    return cell.study(("math",), 1.0, 2 * cell.size.sft_steps, until=equal)


def study_verbose(cell: Cell) -> dict[str, Any]:
    """Solutions of math whose steps are written once in one half and twice in the other."""
    return cell.study(("math",), 1.0, change=_half_verbose)


def _half_verbose(problems: list[Problem]) -> list[Problem]:
    return [replace(p, solution=_doubled(p.solution)) if n % 2 else p for n, p in enumerate(problems)]


def _doubled(solution: str) -> str:
    steps, _, answer = solution.partition("\n")
    return f"{steps};{steps}\n{answer}"


def weakened(problems: list[Problem]) -> list[Problem]:
    """Each with a single test, at a point that the question tells: many wrong functions pass."""
    return [replace(p, answer=_weak(p)) for p in problems]


def _weak(problem: Problem) -> str:
    record = json.loads(problem.answer)
    told = problem.question.partition("f(")[2].partition(",")[0].split(")=")
    if record["cases"] and problem.metadata.get("kind") == "linear":
        record["cases"] = [{"args": [int(told[0])], "ret": int(told[1])}]
    else:
        record["cases"] = record["cases"][:1]
    return json.dumps(record)


def corrupted(problems: list[Problem]) -> list[Problem]:
    """One problem of ten expects a wrong value in a test, so that no right program passes."""
    random = Random("corrupted")
    return [replace(p, answer=_wrong(p)) if random.random() < 0.1 else p for p in problems]


def _wrong(problem: Problem) -> str:
    record = json.loads(problem.answer)
    first = record["cases"][0]
    first["ret"] = first["ret"] + 1 if isinstance(first["ret"], int) else [first["ret"]]
    return json.dumps(record)
