"""What the policy wrote and how it was judged.

Tokens go from the generator to the trainer as they are: text is read by the verifier and never encoded again.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

from bloomery.data.prompts import Prompt
from bloomery.generate import Completion, Request, SamplingParams, derive_seed
from bloomery.posttrain.objectives import degenerate
from bloomery.posttrain.ranks import Ranks
from bloomery.verify import Reward, Verdict, form_of
from bloomery.verify.reward import FORMLESS


class Source(Protocol):
    """What writes completions: an engine, an endpoint, vLLM."""

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index, completion) of each request as it finishes."""
        ...


class Judge(Protocol):
    """What judges them: a verifier pool."""

    def submit(self, verifier: str, completion: str, answer: str) -> "Future[Verdict]":
        """The verdict, now or later."""
        ...


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt and its verdict.

    form: whether its form was kept, `None` where the verifier asks for none; paid: what is learnt from, the verdict
    where that is `None`.
    """

    prompt: Prompt
    completion: Completion
    verdict: Verdict
    form: Verdict | None = None
    paid: Verdict | None = None

    @classmethod
    def of(
        cls, prompt: Prompt, completion: Completion, verdict: Verdict, reward: Reward | None, require_think: bool
    ) -> Self:
        """With its form judged, and paid as `reward` says."""
        if prompt.verifier in FORMLESS:
            return cls(prompt, completion, verdict)
        form = form_of(completion.text or "", require_think)
        return cls(prompt, completion, verdict, form, None if reward is None else reward.of(verdict, form))

    @property
    def reward(self) -> float | None:
        """What is learnt from; `None` where the completion could not be judged."""
        return (self.paid or self.verdict).score

    @property
    def tokens(self) -> int:
        """Tokens written, the one that ended it included."""
        return len(self.completion.token_ids)

    @property
    def truncated(self) -> bool:
        """Whether it was cut off at the longest length."""
        return self.completion.finish_reason == "length"


Group = Sequence[Sample]


@dataclass(frozen=True)
class Rollouts:
    """`groups[g][j]` is sample j of prompt g: grouped by position, never by the prompt's text or id.

    `seconds`: how long they took, by name; the only part that differs between equal runs.
    """

    groups: Sequence[Group]
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len({len(group) for group in self.groups}) == 1, "groups of unequal size"

    @cached_property
    def samples(self) -> list[Sample]:
        """All samples, group after group."""
        return [sample for group in self.groups for sample in group]

    @cached_property
    def rewards(self) -> Tensor:
        """(groups, samples) fp64: before any length counts; 0 where there is none, which `valid` tells apart."""
        return torch.tensor([[s.reward or 0.0 for s in group] for group in self.groups], dtype=torch.float64)

    @cached_property
    def valid(self) -> Tensor:
        """(groups, samples) bool: False where the verifier could not judge."""
        return torch.tensor([[s.verdict.score is not None for s in group] for group in self.groups])

    @cached_property
    def lengths(self) -> Tensor:
        """(groups, samples) int64: tokens written."""
        return torch.tensor([[s.tokens for s in group] for group in self.groups])

    @cached_property
    def truncated(self) -> Tensor:
        """(groups, samples) bool: cut off at the longest length."""
        return torch.tensor([[s.truncated for s in group] for group in self.groups])

    @property
    def repeated(self) -> float:
        """Share of prompts whose tokens are those of an earlier prompt here."""
        return 1 - len({group[0].prompt.ids for group in self.groups}) / len(self.groups)

    @cached_property
    def degenerate(self) -> Tensor:
        """(groups,) bool: samples of equal reward, which teach nothing."""
        return degenerate(self.rewards, self.valid)

    def mixed(self, skip_truncated: bool = False) -> list[Group]:
        """The groups with samples of different reward, which alone teach something.

        By the bare verdicts: a reward shaped by length would make a signal of groups that are all wrong.
        skip_truncated: cut-off samples are not learnt, so a group needs another one.
        """
        flat = self.degenerate
        if skip_truncated:
            flat = flat | (self.truncated | ~self.valid).all(-1)
        return [group for group, is_flat in zip(self.groups, flat.tolist(), strict=True) if not is_flat]

    def metrics(self) -> dict[str, float]:
        """Shares over judged samples, and mean lengths by outcome; a mean over nothing is left out."""
        judged = [s for s in self.samples if s.verdict.score is not None]
        flat = self.degenerate
        solved = self.rewards.amax(-1) >= 1
        found = {
            "accuracy": _mean([s.verdict.correct for s in judged]),
            "reward": _mean([s.reward or 0.0 for s in judged]),
            "groups_all_wrong": (flat & ~solved).double().mean().item(),
            "groups_all_right": (flat & solved).double().mean().item(),
            "completion_tokens": _mean([s.tokens for s in self.samples]),
            "completion_tokens/right": _mean([s.tokens for s in judged if s.verdict.correct]),
            "completion_tokens/wrong": _mean([s.tokens for s in judged if not s.verdict.correct and not s.truncated]),
            "truncated": _mean([s.truncated for s in self.samples]),
            "prompts_repeated": self.repeated,
        }
        return {k: v for k, v in (found | self._by_source(judged) | self._statuses()).items() if v is not None}

    def _by_source(self, judged: list[Sample]) -> dict[str, float | None]:
        """Under a name of its own where several domains have the plain one."""
        names = sorted({s.prompt.source for s in judged})
        metric = "accuracy" if len({s.prompt.domain for s in judged}) < 2 else "source_accuracy"
        if len(names) < 2:
            return {}
        return {
            f"{metric}/{name}": _mean([s.verdict.correct for s in judged if s.prompt.source == name]) for name in names
        }

    def _statuses(self) -> dict[str, float]:
        counts = Counter(s.verdict.status for s in self.samples)
        return {f"status/{status}": count / len(self.samples) for status, count in sorted(counts.items())}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def roll_out(
    source: Source, judge: Judge, prompts: Sequence[Prompt], group_size: int, params: SamplingParams,
    seed: Sequence[int | str], ranks: Ranks | None = None, reward: Reward | None = None, require_think: bool = False,
) -> Rollouts:  # fmt: skip
    """Sample `group_size` completions of each prompt; each is judged while others are still being written.

    A sample's seed is derived from (*seed, position of its prompt, its number): the same call writes the same text.
    A bug of a verifier is raised as soon as the next completion is there, and the rest is not written.
    ranks: those that share the work; every rank returns all samples. reward: how a verdict and the form make what is
    paid; `None`: the verdict alone. require_think: whether that form has a `</think>`.
    """
    ranks = ranks or Ranks()
    own = ranks.share(len(prompts) * group_size)
    requests = [
        Request(prompts[i // group_size].ids, params.model_copy(
            update={"seed": derive_seed(*seed, i // group_size, i % group_size)}
        ))
        for i in own
    ]  # fmt: skip
    clock = _Clock()
    pending: dict[int, tuple[Completion, Future[Verdict]]] = {}
    for place, completion in source.stream(requests):
        index = own[place]
        prompt = prompts[index // group_size]
        assert completion.text is not None, "the generator needs a decode function to be judged"
        future = judge.submit(prompt.verifier, completion.text, prompt.answer)
        clock.watch(future)
        pending[index] = completion, future
        clock.raise_bug()
    clock.written()
    judged = [(completion, verdict.result()) for _, (completion, verdict) in sorted(pending.items())]
    everyone = ranks.gather((judged, clock.seconds()))
    found = [pair for pairs, _ in everyone for pair in pairs]
    samples = [Sample.of(prompts[i // group_size], *pair, reward, require_think) for i, pair in enumerate(found)]
    groups = [samples[start : start + group_size] for start in range(0, len(samples), group_size)]
    return Rollouts(groups, _slowest([seconds for _, seconds in everyone]))


def _slowest(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of all ranks, which wait for one another."""
    return {name: max(each[name] for each in seconds) for name in seconds[0]}


class _Clock:
    """When completions were handed to the verifier and when their verdicts came."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._submitted: list[float] = []
        self._done: list[float] = []
        self._failed: list[Future[Verdict]] = []

    def watch(self, future: "Future[Verdict]") -> None:
        """One more completion is being judged."""
        begun = time.perf_counter()
        self._submitted.append(begun)
        future.add_done_callback(lambda ended: self._note(begun, ended))

    def _note(self, begun: float, ended: "Future[Verdict]") -> None:
        """Called by whichever thread has the verdict."""
        self._done.append(time.perf_counter() - begun)
        if not ended.cancelled() and ended.exception() is not None:
            self._failed.append(ended)

    def raise_bug(self) -> None:
        """What a verifier raised, if one did."""
        if self._failed:
            self._failed[0].result()

    def written(self) -> None:
        """All completions are there."""
        self._written = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """`decode`; `reward`, from the first completion handed over to the last verdict; `reward_wait`, the part of it
        that no decoding hides; quantiles of one verdict's, the time in the queue included."""
        now, waits = time.perf_counter(), sorted(self._done) or [0.0]
        return {
            "decode_seconds": self._written - self._start,
            "reward_seconds": now - (self._submitted or [now])[0],
            "reward_wait_seconds": now - self._written,
            "verdict_p50_seconds": waits[len(waits) // 2],
            "verdict_p99_seconds": waits[min(len(waits) - 1, len(waits) * 99 // 100)],
        }
