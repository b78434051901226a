"""Questions into prompts, per second of processor time on one core, without any model.

`filters/questions`: raw rows of multiple choice, in memory, read, filtered by every rule, shuffled and written as
prompts; the peer runs the same rules row by row in `datasets.Dataset.map`, as most data are prepared.
`filters/decontaminate`: prompts and bare questions compared with the runs of nine words of an evaluation set, as they
are and with numbers masked; the peer looks up the same runs as tuples in Python sets, but not the sets of options and
the short items that ours compares too.
`python -m bench.filters [--quick]` prints one JSON line per figure; ratio > 1: we are faster. The rows are made up:
30 words a question and 4 options of 1 to 6, one row in ten damaged.
"""

import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import datasets

from bench.figure import take_turns
from bloomery.data.dataset import SCHEMAS
from bloomery.data.decontaminate import Decontaminator
from bloomery.data.document import Document, Drops
from bloomery.data.qa_source import QAConfig, Questions
from bloomery.data.read import Invalid, Located
from bloomery.data.runs import NUMBER, masked_words
from bloomery.data.words import tokens

NGRAM, ITEMS, BENCHMARK = 9, 4000, 3000
CONFIG = QAConfig(layout="mmlu", max_damaged=1)
_LETTERS = "etaoinshrdlucmfwypvbgkqjxz"


def rows(count: int, seed: int) -> list[Located]:
    """Made-up questions, the same for the same seed."""
    drawn = random.Random(seed)
    words = ["".join(drawn.choices(_LETTERS, weights=range(27, 1, -1), k=drawn.randint(2, 9))) for _ in range(5000)]
    made = []
    for number in range(count):
        options = [" ".join(drawn.choices(words, k=drawn.randint(1, 6))) for _ in range(4)]
        if number % 10 == 0:
            options[3] = options[0]
        question = " ".join(drawn.choices(words, k=30)).capitalize() + "?"
        made.append((f"row {number}", {"question": question, "choices": options, "answer": drawn.randrange(4)}))
    return made


def prompts(some: list[Located]) -> list[Document]:
    """Our side."""
    return list(Questions(some, CONFIG, {}, "bench", Invalid()).documents("prompts"))


def by_map(dataset: datasets.Dataset) -> datasets.Dataset:
    """The same rules on one row at a time; a row that is dropped has no prompt."""

    def asked(row: dict[str, Any]) -> dict[str, Any]:
        made = prompts([("", row)])
        return made[0].row("prompts") if made else dict.fromkeys(SCHEMAS["prompts"].names)

    columns = dataset.column_names
    return dataset.map(asked, remove_columns=columns, keep_in_memory=True, load_from_cache_file=False)


class Tuples:
    """Runs of words of an evaluation set as tuples, and the same with numbers masked."""

    def __init__(self, items: list[Document]):
        texts = [tokens(item.text) for item in items]
        self.known = {run for words in texts for run in runs(words)}
        self.masked = {run for words in texts for run in runs(masked_words(words)) if NUMBER in run}

    def clean(self, documents: list[Document]) -> list[Document]:
        """Those that hold no run, with and without the template; like ours it also looks which are renumbered."""
        kept = []
        for document in documents:
            words = [tokens(document.text), tokens(bare(document))]
            if all(self.known.isdisjoint(runs(each)) for each in words):
                kept.append(document)
                all(self.masked.isdisjoint(runs(masked_words(each))) for each in words)
        return kept


def runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    """Every run of `NGRAM` words."""
    return zip(*(words[start:] for start in range(NGRAM)), strict=False)


def bare(document: Document) -> str:
    """Question and options."""
    return "\n".join((document.metadata["question"], *document.metadata["options"]))


def main() -> None:
    datasets.disable_progress_bars()
    repeats, count = (5, ITEMS // 4) if "--quick" in sys.argv else (11, ITEMS)
    some = rows(count, seed=0)
    dataset = datasets.Dataset.from_list([row for _, row in some])
    print(json.dumps(take_turns(
        "filters/questions", lambda: prompts(some), lambda: by_map(dataset), count, "questions/core-second", repeats,
    )), flush=True)  # fmt: skip
    exam = list(Questions(rows(BENCHMARK, seed=1), CONFIG, {}, "exam", Invalid()).documents("documents"))
    documents, ours, peer = prompts(some), Decontaminator(NGRAM), Tuples(exam)
    ours.add("exam", exam)
    assert len(list(ours(documents, Drops()))) == len(peer.clean(documents)) == len(documents)
    print(json.dumps(take_turns(
        "filters/decontaminate", lambda: list(ours(documents, Drops())), lambda: peer.clean(documents),
        len(documents), "questions/core-second", repeats,
    )), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
