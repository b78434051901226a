"""Sampling answers, judging them, and turning verdicts into the rows of a report."""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from bloomery.data.prompts import Prompt
from bloomery.evaluate import efficiency, statistics
from bloomery.evaluate.efficiency import Answered
from bloomery.evaluate.statistics import Estimate
from bloomery.generate import Completion, Engine, Request, SamplingParams, derive_seed
from bloomery.progress import Bar
from bloomery.verify import Pool, Verdict, form_of
from bloomery.verify.extract import boxed_answer
from bloomery.verify.numbers import read_number
from bloomery.verify.reward import FORMLESS

TASK_VERSION = 1
"""Raised when a change here makes figures incomparable with those of an earlier report."""
ALL = "all"
_UNREADABLE = ("no_answer", "no_think", "multi_box", "parse_fail")


@dataclass(frozen=True)
class Answer:
    """One completion of one problem and its verdict."""

    prompt: Prompt
    sample: int
    completion: Completion
    verdict: Verdict

    @property
    def tokens(self) -> int:
        """Tokens written, the one that ended it included."""
        return len(self.completion.token_ids)

    @property
    def vote(self) -> Hashable | None:
        """What this answer says, for majority voting: right answers agree whatever their form, wrong ones by value.

        None where no answer can be read.
        """
        if self.verdict.correct:
            return "right"
        if self.verdict.status in _UNREADABLE:
            return None
        said = boxed_answer(self.completion.text or "")
        said = said if isinstance(said, str) else (self.completion.text or "")
        number = read_number(said)
        return number.value if number is not None else ("text", " ".join(said.split()).casefold())

    def row(self) -> dict[str, Any]:
        """The row of `samples.parquet`."""
        return {
            "task": self.prompt.source, "id": self.prompt.id, "source": self.prompt.source,
            "prompt": [{"role": m["role"], "content": m["content"]} for m in self.prompt.messages],
            "completion": self.completion.text, "answer": self.prompt.answer, "score": self.verdict.score,
            "status": self.verdict.status, "reason": self.verdict.reason, "tokens": self.tokens,
            "finish_reason": self.completion.finish_reason, "sample": self.sample,
        }  # fmt: skip


def choose(prompts: Sequence[Prompt], most: int | None, seed: int) -> list[Prompt]:
    """At most `most` of them, chosen by `seed` alone, in their own order: every model meets the same problems."""
    if most is None or most >= len(prompts):
        return list(prompts)
    return [prompts[i] for i in sorted(random.Random(f"problems {seed}").sample(range(len(prompts)), most))]


def answer_all(
    engine: Engine, pool: Pool, prompts: Sequence[Prompt], num_samples: int, params: SamplingParams, seed: int
) -> list[list[Answer]]:
    """`num_samples` answers to each prompt, judged while others are still being written.

    The seed of an answer depends on the problem's id, not on its place, so that a smaller evaluation is a part of a
    larger one.
    """
    requests = [
        Request(prompt.ids, params.model_copy(update={"seed": derive_seed(seed, prompt.source, prompt.id, number)}))
        for prompt in prompts
        for number in range(num_samples)
    ]
    pending = {}
    with Bar("evaluate", len(requests)) as bar:
        for index, completion in engine.stream(requests):
            prompt = prompts[index // num_samples]
            assert completion.text is not None, "the engine needs a decode function to be judged"
            pending[index] = completion, pool.submit(prompt.verifier, completion.text, prompt.answer)
            bar.update(len(pending))
    answers = [
        Answer(prompts[index // num_samples], index % num_samples, completion, verdict.result())
        for index, (completion, verdict) in sorted(pending.items())
    ]
    return [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]


def report_rows(
    problems: Sequence[Sequence[Answer]], longest: int | None = None, require_think: bool = False
) -> list[dict[str, Any]]:
    """Every metric by source, the task's name; before that, over all problems (`all`) where sources are several.

    longest: most new tokens that an answer could have, for the accuracy at smaller budgets.
    """
    parts: dict[str, list[Sequence[Answer]]] = {}
    for problem in problems:
        parts.setdefault(problem[0].prompt.source, []).append(problem)
    if len(parts) > 1:
        parts = {ALL: list(problems), **parts}
    found = [(task, metrics(part, longest, require_think)) for task, part in parts.items()]
    found[0][1].update(_adaptivity(problems))
    return [
        {"task": task, "version": TASK_VERSION, "metric": metric, **_fields(estimate)}
        for task, estimates in found
        for metric, estimate in estimates.items()
    ]


def _adaptivity(problems: Sequence[Sequence[Answer]]) -> dict[str, Estimate]:
    """Where there is mathematics among other domains."""
    domains: dict[str, list[list[Answered]]] = {}
    for problem, judged in zip(problems, _judged(problems), strict=True):
        domains.setdefault(problem[0].prompt.domain, []).append(judged)
    found = efficiency.adaptivity({name: [p for p in own if p] for name, own in domains.items()})
    return {} if found is None else {"tokens_math_over_rest": found}


def _judged(problems: Sequence[Sequence[Answer]]) -> list[list[Answered]]:
    return [[Answered(a.verdict.correct, a.tokens) for a in p if a.verdict.score is not None] for p in problems]


def _fields(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "stderr": estimate.stderr, "n": estimate.n}


def metrics(
    problems: Sequence[Sequence[Answer]], longest: int | None = None, require_think: bool = False
) -> dict[str, Estimate]:
    """Metric → estimate. An answer that could not be judged is left out, and so is a problem without any verdict."""
    judged = [[a for a in problem if a.verdict.score is not None] for problem in problems]
    judged = [problem for problem in judged if problem]
    found: dict[str, Estimate] = {}
    if not judged:
        return found
    num_samples = max(map(len, judged))
    found[f"avg@{num_samples}"] = statistics.average_at_k([[a.verdict.score or 0.0 for a in p] for p in judged])
    for k in _ks(num_samples):
        enough = [problem for problem in judged if len(problem) >= k]
        found[f"pass@{k}"] = statistics.mean([statistics.pass_at_k(_right(p), len(p), k) for p in enough])
        found[f"maj@{k}"] = statistics.mean([_majority(p, k) for p in enough])
    return found | _beyond(judged, require_think) | _lengths(problems) | efficiency.metrics(_judged(judged), longest)


def _beyond(judged: Sequence[Sequence[Answer]], require_think: bool) -> dict[str, Estimate]:
    """Accuracy − 1/c over the problems with c options, and the share of answers in a box behind the thinking."""
    guessed = [p for p in judged if p[0].prompt.options]
    formed = [p for p in judged if p[0].prompt.verifier not in FORMLESS]
    found = {}
    if guessed:
        found["beyond_chance"] = statistics.mean([_right(p) / len(p) - 1 / p[0].prompt.options for p in guessed])
    if formed:
        found["format"] = statistics.mean(
            [sum(form_of(a.completion.text or "", require_think).correct for a in p) / len(p) for p in formed]
        )
    return found


def _lengths(problems: Sequence[Sequence[Answer]]) -> dict[str, Estimate]:
    written = [sum(a.tokens for a in problem) for problem in problems]
    per_correct = statistics.ratio(written, [_right(problem) for problem in problems])
    return {
        "tokens_per_answer": statistics.mean([w / len(p) for w, p in zip(written, problems, strict=True)]),
        **({"tokens_per_correct": per_correct} if per_correct else {}),
        "truncated": statistics.mean(
            [sum(a.completion.finish_reason == "length" for a in problem) / len(problem) for problem in problems]
        ),
    }


def _ks(num_samples: int) -> list[int]:
    """Powers of two above 1, and all samples."""
    powers = [2**i for i in range(1, num_samples.bit_length()) if 2**i < num_samples]
    return [*powers, num_samples] if num_samples > 1 else []


def _right(problem: Sequence[Answer]) -> int:
    return sum(answer.verdict.correct for answer in problem)


def _majority(problem: Sequence[Answer], k: int) -> float:
    return statistics.majority_at_k([a.vote for a in problem], [a.verdict.correct for a in problem], k)
