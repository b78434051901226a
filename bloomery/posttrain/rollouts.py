"""What the policy wrote and how it was judged.

Tokens go from the generator to the trainer as they are: text is read by the verifier and never encoded again.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bloomery import artifact
from bloomery.data.prompts import Prompt
from bloomery.errors import BloomeryError
from bloomery.generate import Completion, Engine, Request, SamplingParams, derive_seed
from bloomery.posttrain.objectives import degenerate
from bloomery.verify import Pool, Verdict


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt and its verdict."""

    prompt: Prompt
    completion: Completion
    verdict: Verdict

    @property
    def tokens(self) -> int:
        """Tokens written, the one that ended it included."""
        return len(self.completion.token_ids)


@dataclass(frozen=True)
class Rollouts:
    """`groups[g][j]` is sample j of prompt g: grouped by position, never by the prompt's text or id."""

    groups: Sequence[Sequence[Sample]]

    def __post_init__(self) -> None:
        assert len({len(group) for group in self.groups}) == 1, "groups of unequal size"

    @cached_property
    def samples(self) -> list[Sample]:
        """All samples, group after group."""
        return [sample for group in self.groups for sample in group]

    @cached_property
    def rewards(self) -> Tensor:
        """(groups, samples) fp64; 0 where there is no verdict, which `valid` tells apart."""
        return torch.tensor([[s.verdict.score or 0.0 for s in group] for group in self.groups], dtype=torch.float64)

    @cached_property
    def valid(self) -> Tensor:
        """(groups, samples) bool: False where the verifier could not judge."""
        return torch.tensor([[s.verdict.score is not None for s in group] for group in self.groups])

    @property
    def has_signal(self) -> bool:
        """Whether any group holds samples of different reward."""
        return not bool(degenerate(self.rewards, self.valid).all())

    def metrics(self) -> dict[str, float]:
        """Shares over judged samples, and mean lengths by outcome; a mean over nothing is left out."""
        judged = [s for s in self.samples if s.verdict.score is not None]
        flat = degenerate(self.rewards, self.valid)
        solved = (self.rewards * self.valid).sum(-1) > 0
        found = {
            "accuracy": _mean([s.verdict.correct for s in judged]),
            "reward": _mean([s.verdict.score or 0.0 for s in judged]),
            "groups_all_wrong": (flat & ~solved).double().mean().item(),
            "groups_all_right": (flat & solved).double().mean().item(),
            "completion_tokens": _mean([s.tokens for s in self.samples]),
            "completion_tokens/right": _mean([s.tokens for s in judged if s.verdict.correct]),
            "completion_tokens/wrong": _mean([s.tokens for s in judged if not s.verdict.correct]),
            "truncated": _mean([s.completion.finish_reason == "length" for s in self.samples]),
        }
        return {k: v for k, v in (found | self._by_source(judged) | self._statuses()).items() if v is not None}

    def _by_source(self, judged: list[Sample]) -> dict[str, float | None]:
        names = sorted({s.prompt.source for s in judged})
        if len(names) < 2:
            return {}
        return {
            f"accuracy/{name}": _mean([s.verdict.correct for s in judged if s.prompt.source == name]) for name in names
        }

    def _statuses(self) -> dict[str, float]:
        counts = Counter(s.verdict.status for s in self.samples)
        return {f"status/{status}": count / len(self.samples) for status, count in sorted(counts.items())}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def roll_out(
    engine: Engine, pool: Pool, prompts: Sequence[Prompt], group_size: int, params: SamplingParams,
    seed: Sequence[int | str],
) -> Rollouts:  # fmt: skip
    """Sample `group_size` completions of each prompt; each is judged while others are still being written.

    A sample's seed is derived from (*seed, position of its prompt, its number): the same call writes the same text.
    """
    requests = [
        Request(prompt.ids, params.model_copy(update={"seed": derive_seed(*seed, position, number)}))
        for position, prompt in enumerate(prompts)
        for number in range(group_size)
    ]
    pending: dict[int, tuple[Completion, Future[Verdict]]] = {}
    for index, completion in engine.stream(requests):
        prompt = prompts[index // group_size]
        assert completion.text is not None, "the engine needs a decode function to be judged"
        pending[index] = completion, pool.submit(prompt.verifier, completion.text, prompt.answer)
    samples = [
        Sample(prompts[index // group_size], completion, verdict.result())
        for index, (completion, verdict) in sorted(pending.items())
    ]
    return Rollouts([samples[start : start + group_size] for start in range(0, len(samples), group_size)])


def require_judged(rollouts: Rollouts, max_unjudged: float) -> None:
    """Stop when more than this share of samples could not be judged: a broken verifier must not steer training."""
    unjudged = [s for s in rollouts.samples if s.verdict.score is None]
    if len(unjudged) > max_unjudged * len(rollouts.samples):
        raise BloomeryError(
            f"the verifier could not judge {len(unjudged)} of {len(rollouts.samples)} completions (at most "
            f"{max_unjudged:.0%} allowed); the first reason: {unjudged[0].verdict.reason}. "
            "Nothing was trained on them; repair the verifier and run the same command to continue"
        )


class RolloutStore:
    """Some steps' samples on disk, one file a step: `rollouts-00010.parquet`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, step: int, rollouts: Rollouts) -> None:
        """Keep the samples of `step`, with the columns of an evaluation's samples."""
        table = pa.Table.from_pylist(list(_rows(step, rollouts)))
        with artifact.replacing(self.folder / f"rollouts-{step:05d}.parquet") as temporary:
            pq.write_table(table, temporary)

    def rewind(self, step: int) -> None:
        """Forget what a resumed run will write again: everything after `step`."""
        for file in self.folder.glob("rollouts-*.parquet"):
            if int(file.stem.rpartition("-")[2]) > step:
                file.unlink()


def _rows(step: int, rollouts: Rollouts) -> Iterator[dict[str, Any]]:
    for group in rollouts.groups:
        for number, s in enumerate(group):
            yield {
                "step": step, "id": s.prompt.id, "source": s.prompt.source,
                "prompt": [{"role": m["role"], "content": m["content"]} for m in s.prompt.messages],
                "completion": s.completion.text, "answer": s.prompt.answer, "score": s.verdict.score,
                "status": s.verdict.status, "reason": s.verdict.reason, "tokens": s.tokens,
                "finish_reason": s.completion.finish_reason, "sample": number,
            }  # fmt: skip
