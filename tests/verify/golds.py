"""The published math sets: each problem's question and gold answer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bloomery.verify.extract import boxes

Row = dict[str, Any]


def _boxed(row: Row) -> tuple[str, str]:
    """The gold is the last box of the worked solution."""
    return row["problem"], (boxes(row["solution"]) or [""])[-1]


def _after_hashes(row: Row) -> tuple[str, str]:
    return row["question"], row["answer"].rpartition("####")[2].strip()


READERS: dict[str, Callable[[Row], tuple[str, str]]] = {
    "gsm8k_train": _after_hashes,
    "gsm8k_test": _after_hashes,
    "math_test": _boxed,
    "minerva_math": _boxed,
    "olympiadbench": lambda row: (row["question"], ", ".join(row["final_answer"])),
    "college_math": lambda row: (row["question"], row["answer"]),
    "gaokao2023en": lambda row: (row["question"], row["answer"]),
}
"""File name → row → (question, gold answer)."""


def read(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """All problems of one set."""
    for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        yield READERS[name](json.loads(line))
