"""How far can the verdicts on a set of prompts be trusted? Completions whose verdict is known are judged, and counted.

Each prompt gets its own canaries: its gold answer as it stands and written otherwise must be right; nothing at all, the
question copied back, two boxes and a neighbouring number must not be. A prompt of which one comes out otherwise is bad:
reinforcement learning would be paid for nothing there, or could not be paid at all.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from bloomery.errors import ArtifactError
from bloomery.verify.canaries import echo, stated
from bloomery.verify.numbers import read_number
from bloomery.verify.pool import Pool
from bloomery.verify.verdict import Verdict

UNUSABLE = "unusable"
"""Stands for a status where the verifier refuses the gold answer itself."""

_FORMULA = re.compile(r"\$([^$]+)\$")
_INTEGER = re.compile(r"-?\d+")
_BATCH = 1000
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt: `question` is its readable text, `answer` and `verifier` its columns."""

    id: str
    source: str
    question: str
    answer: str
    verifier: str


@dataclass(frozen=True, slots=True)
class Case:
    """A completion for an item and whether it must be judged right: a canary, or a rollout as it was judged before."""

    item: Item
    kind: str
    completion: str
    right: bool


@dataclass(frozen=True, slots=True)
class Wrong:
    """A verdict that is not what it must be."""

    id: str
    source: str
    kind: str
    completion: str
    answer: str
    expected: str
    status: str
    reason: str


@dataclass
class Tally:
    """The counts of one source."""

    items: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    paid: set[str] = field(default_factory=set)
    cases: int = 0
    differing: int = 0
    unjudged: int = 0
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def rates(self) -> dict[str, Any]:
        """Shares of prompts: a right answer refused (`false_negative`), a wrong one paid (`false_positive`), either
        (`error`); share of all cases judged otherwise than they must be (`differing`); statuses by kind of case."""
        prompts = max(len(self.items), 1)
        return {
            "prompts": len(self.items), "cases": self.cases, "unjudged": self.unjudged,
            "false_negative": len(self.refused) / prompts, "false_positive": len(self.paid) / prompts,
            "error": len(self.refused | self.paid) / prompts, "differing": self.differing / max(self.cases, 1),
            "statuses": {kind: dict(counts.most_common()) for kind, counts in self.statuses.items()},
        }  # fmt: skip


@dataclass
class Measured:
    """What judging cases gave: counts by source, the cases that came out otherwise, seconds of each verdict."""

    sources: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    wrong: list[Wrong] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def count(self, case: Case, verdict: Verdict | ArtifactError, seconds: float) -> None:
        """One more case judged. A gold that its verifier refuses is a right answer refused."""
        tally, item = self.sources[case.item.source], case.item
        status = verdict.status if isinstance(verdict, Verdict) else UNUSABLE
        tally.items.add(item.id)
        tally.cases += 1
        tally.statuses[case.kind][status] += 1
        self.seconds.append(seconds)
        if status == "infra_error":
            tally.unjudged += 1
            return
        if status != UNUSABLE and (status == "correct") == case.right:
            return
        tally.differing += 1
        (tally.paid if status == "correct" else tally.refused).add(item.id)
        reason = verdict.reason if isinstance(verdict, Verdict) else str(verdict)
        expected = "correct" if case.right or status == UNUSABLE else "not correct"
        shown = case.completion[-_SHOWN:], item.answer[:_SHOWN]
        self.wrong.append(Wrong(item.id, item.source, case.kind, *shown, expected, status, reason))

    def report(self, most_listed: int) -> dict[str, Any]:
        """Rates by source, quantiles of the seconds a verdict took, and the worst prompts: those with most wrong."""
        ordered = sorted(self.seconds)
        quantile = {f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 99) if ordered}
        by_item = Counter((wrong.source, wrong.id) for wrong in self.wrong)
        worst = sorted(self.wrong, key=lambda wrong: -by_item[wrong.source, wrong.id])[:most_listed]
        return {
            "sources": {name: tally.rates() for name, tally in self.sources.items()},
            "seconds": quantile | {"max": max(ordered, default=0.0)},
            "worst": [asdict(wrong) for wrong in worst],
        }


def measure(cases: Iterable[Case], pool: Pool, workers: int = 2) -> Measured:
    """Judge `cases` with as many at once as the pool has workers, so that waiting is no part of a verdict's seconds."""

    def judged(case: Case) -> tuple[Verdict | ArtifactError, float]:
        start = time.perf_counter()
        try:
            verdict: Verdict | ArtifactError = pool.submit(
                case.item.verifier, case.completion, case.item.answer
            ).result()
        except ArtifactError as error:
            verdict = error
        return verdict, time.perf_counter() - start

    measured, waiting = Measured(), iter(cases)
    with ThreadPoolExecutor(workers, thread_name_prefix="audit") as threads:
        while batch := list(islice(waiting, _BATCH)):
            for case, (verdict, seconds) in zip(batch, threads.map(judged, batch), strict=True):
                measured.count(case, verdict, seconds)
    return measured


def canaries(item: Item) -> Iterator[Case]:
    """The completions of known verdict for one prompt.

    `format` has no gold, so nothing is right for it here; a program's gold is its reference solution, where it has one.
    """
    yield Case(item, "empty", "", right=False)
    yield Case(item, "empty box", r"\boxed{}", right=False)
    if item.verifier == "format":
        return
    gold = _gold(item)
    if item.verifier == "program":
        if '"reference"' in item.answer:
            yield Case(item, "gold echo", gold, right=True)
        return
    yield Case(item, "gold echo", gold, right=True)
    yield Case(item, "two boxes", rf"{gold} or \boxed{{{_other(item.answer)}}}", right=False)
    yield Case(item, "question echo", rf"\boxed{{{item.question}}}", right=False)
    if formulas := _FORMULA.findall(item.question):
        yield Case(item, "formula echo", rf"\boxed{{{formulas[-1]}}}", right=False)
    if gold:
        yield from (Case(item, kind, text, right) for kind, text, right in _rewritten(item))


def _gold(item: Item) -> str:
    try:
        return echo(item.verifier, item.answer)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArtifactError,
    ):  # no JSON of the right form: the verifier says so itself
        return ""


def _rewritten(item: Item) -> Iterator[tuple[str, str, bool]]:
    """(kind, completion, right): the gold in other clothes, and for numbers one that is one off."""
    gold = item.answer.strip()
    if item.verifier == "answer":
        yield "spaced gold", rf"<think>so</think>It is $\boxed{{ {gold} }}$.", True
        if r"\frac" in gold:
            yield "other fraction", rf"\boxed{{{gold.replace(chr(92) + 'frac', chr(92) + 'dfrac')}}}", True
        if (number := read_number(gold)) is not None:
            above, below = number.value.numerator, number.value.denominator
            yield "as a fraction", rf"\boxed{{\frac{{{above}}}{{{below}}}}}", True
            yield "one off", rf"\boxed{{\frac{{{above + below}}}{{{below}}}}}", False
    elif item.verifier in ("choice", "label"):
        yield "spaced gold", rf"\boxed{{ ({stated(item.verifier, gold)[:1]}) }}", True
        yield "two labels", r"\boxed{A or B}", False
        yield "all labels", r"\boxed{ABCDEFGHIJ}", False
    elif item.verifier in ("exact", "short"):
        yield "spaced gold", rf"\boxed{{ {stated(item.verifier, gold).upper()}. }}", True


def _other(gold: str) -> str:
    """Some other text than the gold: its first whole number one larger, or more text."""
    changed = _INTEGER.sub(lambda match: str(int(match.group()) + 1), gold[:_SHOWN], count=1)
    return changed if changed != gold else f"{gold}x"
