"""Curation of prompts by verdicts: which can be judged, which can be solved, how hard they are, which are learnt.

The rules of AceReason-Nemotron (arXiv 2505.16400, sections 3.1 and 3.2.2). Pure functions over rows and over stored
rollouts; a `judge` may be `bloomery.verify.judge` or any other.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb, fsum
from typing import Any

from bloomery.data.document import Document, Drops
from bloomery.data.prompts import kind_of_question
from bloomery.data.qa_convert import AMBIGUOUS
from bloomery.errors import ArtifactError
from bloomery.verify.audit import Case, Item, canaries
from bloomery.verify.extract import boxed_answer
from bloomery.verify.verdict import Verdict

Judge = Callable[[str, str, str], Verdict]
"""(verifier, completion, answer) → the verdict."""


GUESSED = 0.05
"""What guessing gives more often than this is no sign of knowledge."""


@dataclass(frozen=True, slots=True)
class PassRate:
    """`right` of `judged` completions of a prompt; those that could not be judged are not counted."""

    right: int
    judged: int

    @property
    def rate(self) -> float:
        """Share of right ones; 0 where nothing was judged."""
        return self.right / self.judged if self.judged else 0.0

    def beyond_chance(self, options: int, level: float = GUESSED) -> float:
        """The rate, but 0 where choosing blindly among `options` gives as many right ones with a probability above
        `level` (one-sided binomial test); options: 0 where nothing can be guessed."""
        return 0.0 if options and _at_least(self.right, self.judged, 1 / options) > level else self.rate


def _at_least(right: int, tries: int, chance: float) -> float:
    """P(X ≥ right) of X ~ Binomial(tries, chance)."""
    terms = (comb(tries, k) * chance**k * (1 - chance) ** (tries - k) for k in range(right, tries + 1))
    return fsum(terms)


def verifiable(documents: Iterable[Document], judge: Judge, drops: Drops) -> Iterator[Document]:
    """The prompts whose reward can be trusted; the others are counted in `drops`.

    Dropped: a gold answer that its verifier does not accept, plain or written otherwise, so that nobody could be paid;
    and a prompt where an empty answer, two answers or its own question copied back is paid. The first canary that
    comes out otherwise is the reason.
    """
    for document in documents:
        reason = next((_blame(case) for case in _cases(document) if _misjudged(case, judge)), None)
        if reason is None:
            yield document
        else:
            drops.add(reason, document.id)


def _cases(document: Document) -> Iterator[Case]:
    columns = document.columns
    question = "\n".join(message["content"] for message in columns["prompt"])
    return canaries(Item(document.id, document.source, question, columns["answer"], columns["verifier"]))


def _misjudged(case: Case, judge: Judge) -> bool:
    try:
        verdict = judge(case.item.verifier, case.completion, case.item.answer)
    except ArtifactError:  # the verifier cannot read the gold answer
        return case.kind == "gold echo"
    return verdict.score is not None and verdict.correct != case.right


def _blame(case: Case) -> str:
    if case.right:
        return f"unverifiable answer ({case.kind} not accepted)"
    return "answered by its own question" if case.kind.endswith("echo") else f"pays for nothing ({case.kind})"


def pass_rates(rows: Iterable[Mapping[str, Any]]) -> dict[str, PassRate]:
    """Prompt id → its pass rate over stored rollouts (rows with `id` and `score`)."""
    right, judged = Counter[str](), Counter[str]()
    for row in rows:
        if row["score"] is not None:
            judged[row["id"]] += 1
            right[row["id"]] += row["score"] >= 1
    return {id: PassRate(right[id], count) for id, count in judged.items()}


def majority(completions: Sequence[str], judge: Judge, verifier: str = "answer") -> str | None:
    """The answer that most completions give, equal answers counted together; `None` where no completion has one.

    Equal is what the verifier takes for equal, in the order of the completions: of a tie, the first answer wins.
    """
    votes: dict[str, int] = {}
    for completion in completions:
        found = boxed_answer(completion)
        if isinstance(found, Verdict):
            continue
        same = next((known for known in votes if _equal(known, found, judge, verifier)), found)
        votes[same] = votes.get(same, 0) + 1
    return max(votes, key=lambda answer: votes[answer], default=None)


def _equal(known: str, found: str, judge: Judge, verifier: str) -> bool:
    return known == found or judge(verifier, rf"\boxed{{{found}}}", known).correct


def solvable(
    documents: Iterable[Document], completions: Mapping[str, Sequence[str]], judge: Judge, drops: Drops
) -> Iterator[Document]:
    """The prompts whose majority answer, over the `completions` of a strong model by prompt id, is the gold answer.

    Most golds that no majority confirms are damaged: wrong, cut off, or of another question. A prompt without
    completions was not tried; it is kept.
    """
    for document in documents:
        tried = completions.get(document.id)
        verifier, gold = document.columns["verifier"], document.columns["answer"]
        if tried:
            vote = majority(tried, judge, verifier)
            if vote is None:
                drops.add("no completion has an answer", document.id)
                continue
            if not judge(verifier, rf"\boxed{{{vote}}}", gold).correct:
                drops.add("majority vote is another answer", document.id)
                continue
        yield document


def by_difficulty(
    documents: Iterable[Document],
    rates: Mapping[str, PassRate],
    drops: Drops,
    above: float | None = None,
    at_most: float = 1.0,
    guessed: float = GUESSED,
) -> Iterator[Document]:
    """The prompts with `above` < pass rate ≤ `at_most`; 6/16 is the paper's hard set. Unknown rates are kept.

    `above=0` drops what was never solved: it teaches nothing until it is solved once. Of a choice, right answers that
    blind guessing gives with a probability above `guessed` count as none (`PassRate.beyond_chance`).
    """
    for document in documents:
        known = rates.get(document.id)
        if known is None or not known.judged:
            yield document
            continue
        rate = known.beyond_chance(num_options(document), guessed)
        if above is not None and rate <= above:
            drops.add(f"pass rate at most {above:g}", document.id)
        elif rate > at_most:
            drops.add(f"pass rate above {at_most:g}", document.id)
        else:
            yield document


def num_options(document: Document) -> int:
    """How many a prompt gives to choose from; 0 where it gives none."""
    return kind_of_question(document.metadata, document.source, document.columns["verifier"])[2]


def one_wording(
    documents: Iterable[Document], rates: Mapping[str, PassRate] | None, drops: Drops, least: int
) -> Iterator[Document]:
    """The prompts that have one answer in one wording: all but the questions opened from a choice whose answer could be
    worded otherwise (`ambiguous: mark` in `prepare`) and of which a model that saw no options gave the gold fewer than
    `least` times, or was never asked."""
    for document in documents:
        if not any(done.get(AMBIGUOUS) for done in document.metadata.get("transforms", ())):
            yield document
        elif rates is None or document.id not in rates:
            drops.add("could be worded otherwise, not tried", document.id)
        elif rates[document.id].right < least:
            drops.add(f"could be worded otherwise, given fewer than {least} times", document.id)
        else:
            yield document


def with_difficulty(documents: Iterable[Document], rates: Mapping[str, PassRate], model: str) -> Iterator[Document]:
    """Questions that know their pass rate: `n_pass` of `n_try` by `judge_model`, and 1 − rate as `difficulty`."""
    for document in documents:
        known = rates.get(document.id)
        if known is not None and known.judged and "item" in document.metadata:
            found = {"difficulty": 1 - known.rate, "n_pass": known.right, "n_try": known.judged, "judge_model": model}
            document = replace(document, metadata={**document.metadata, **found})
        yield document


def right_tokens(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Prompt id → mean tokens of its right completions (rows with `id`, `score` and `tokens`)."""
    found: dict[str, list[int]] = {}
    for row in rows:
        if "tokens" not in row:
            raise ArtifactError(f"rollouts: no column 'tokens'; found {', '.join(row)}; min_tokens compares lengths")
        if (row["score"] or 0) >= 1:
            found.setdefault(row["id"], []).append(row["tokens"])
    return {id: sum(lengths) / len(lengths) for id, lengths in found.items()}


def long_enough(
    documents: Iterable[Document], lengths: Mapping[str, float], drops: Drops, least: int
) -> Iterator[Document]:
    """The prompts whose right completions take `least` tokens or more on average; those of unknown length are kept.

    What a strong model solves in few words needs no long thought: AceReason drops what takes R1 under 2,000 tokens.
    """
    for document in documents:
        if lengths.get(document.id, least) >= least:
            yield document
        else:
            drops.add(f"solved in under {least} tokens", document.id)


def unsolved(ids: Sequence[str], rates: Mapping[str, PassRate], solved_at: float = 1.0) -> list[str]:
    """The prompts of the next epoch, in order: without those whose pass rate in this one reached `solved_at`.

    Prompts that were not judged stay. Where all are solved the list is empty, and the stage is done.
    """
    done = {id for id, known in rates.items() if known.judged and known.rate >= solved_at}
    return [id for id in ids if id not in done]
