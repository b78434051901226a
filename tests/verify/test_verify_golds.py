"""Every gold answer of the published math sets: right against itself, or dropped with a reason, and judged in time."""

import os
from itertools import islice
from pathlib import Path

import golds
import pytest

from bloomery.data.document import Document, Drops
from bloomery.data.math_filters import MathFilterConfig, filter_math
from bloomery.verify import Pool
from bloomery.verify.audit import Case, Item, canaries, measure

DATA = Path(os.environ.get("BLOOMERY_DATA", Path(__file__).parents[3] / "shared" / "data"), "math")
needs_data = pytest.mark.skipif(
    not (DATA / "gsm8k_test.jsonl").is_file(), reason=f"no real data under {DATA}; set BLOOMERY_DATA"
)
SLOWEST_SECONDS = 1.0
RIGHT = 0.995


def items(name: str, drops: Drops, every: int = 1) -> list[Item]:
    """The problems that the filters of math data keep, of all or of every so many."""
    documents = (
        Document(question, str(number), columns={"prompt": [{"role": "user", "content": question}], "answer": gold})
        for number, (question, gold) in islice(enumerate(golds.read(DATA, name)), 0, None, every)
    )
    kept = filter_math(documents, MathFilterConfig(), drops)
    return [Item(document.id, name, document.text, document.columns["answer"], "answer") for document in kept]


def gold_echo(item: Item) -> Case:
    return next(case for case in canaries(item) if case.kind == "gold echo")


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", golds.READERS)
def test_golds_are_right_or_dropped_with_a_reason(name: str):
    drops = Drops()
    kept = items(name, drops)
    with Pool(workers=1) as pool:
        pool.judge_all([("answer", "\\boxed{x}", "x+1")])  # what it imports is no part of a verdict
        measured = measure(map(gold_echo, kept), pool, workers=1)
    statuses = measured.sources[name].statuses["gold echo"]
    seconds = measured.report(0)["seconds"]
    assert statuses["correct"] >= RIGHT * len(kept), measured.wrong
    assert seconds["p99"] < SLOWEST_SECONDS


@needs_data
def test_numbers_of_the_published_sets_are_never_paid_one_off():
    """Numbers are judged here, without a worker: fast enough for every run."""
    sample = [item for name in golds.READERS for item in items(name, Drops(), every=41)]
    with Pool(workers=1) as pool:
        measured = measure(
            (case for item in sample for case in canaries(item) if case.kind in ("one off", "as a fraction")), pool
        )
    assert len(measured.seconds) > 300
    assert not measured.wrong
