"""The audit of a dataset folder of prompts, and of rollouts stored for it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from bloomery.data.dataset import Row, read_rows, text_of
from bloomery.data.decontaminate import NGRAM, Decontaminator
from bloomery.data.document import Document, Drops
from bloomery.data.read import Invalid, read_jsonl, read_parquet
from bloomery.errors import ArtifactError
from bloomery.verify.audit import Case, Item, canaries, measure
from bloomery.verify.pool import Pool

_NEEDED = ("id", "completion", "answer", "score")


def audit(
    dataset: Path, rollouts: Path | None = None, limit: int | None = None, workers: int = 2, most_listed: int = 20,
    benchmarks: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """Canaries of every prompt of `dataset` (the first `limit`), stored `rollouts` judged again, `benchmarks` in it.

    Under `prompts` and, where rollouts are given, `rollouts`: rates by source, seconds a verdict, the worst items.
    Under `overlap`, where benchmarks are given: what `overlap` says. `error` is the largest share, over sources, of
    prompts with a canary judged wrongly or of rollouts judged otherwise; or that of prompts that overlap.
    """
    items = [_item(row) for row in islice(read_rows(dataset, "prompts"), limit)]
    with Pool(workers) as pool:
        cases = (case for item in items for case in canaries(item))
        found = {"prompts": measure(cases, pool, workers).report(most_listed)}
        if rollouts is not None:
            stored = stored_cases(rollouts, {item.id: item for item in items})
            found["rollouts"] = measure(stored, pool, workers).report(most_listed)
    if benchmarks:
        found["overlap"] = overlap(dataset, benchmarks, limit, most_listed)
    errors = [found.get("overlap", {}).get("share", 0.0)]
    errors += [rates["error"] for rates in found["prompts"]["sources"].values()]
    errors += [rates["differing"] for rates in found.get("rollouts", {"sources": {}})["sources"].values()]
    return found | {"error": max(errors, default=0.0)}


def overlap(
    dataset: Path, benchmarks: Sequence[Path], limit: int | None = None, most_listed: int = 20
) -> dict[str, Any]:
    """Prompts that hold a run of nine words of a prompt in another dataset folder, by the rules of decontamination.

    `share` of the prompts, counts by benchmark, and the first of them with the words; `renumbered` counts those that
    match with their numbers masked only.
    """
    known, drops = Decontaminator(NGRAM["math"]), Drops()
    for folder in benchmarks:
        known.add(str(folder), _questions(folder))
    kept = sum(1 for _ in known(_questions(dataset, limit), drops))
    hits = [hit for hit in known.hits if not hit.masked]
    return {
        "share": drops.total / max(1, drops.total + kept), "prompts": drops.total,
        "benchmarks": dict(Counter(hit.benchmark for hit in hits)), "renumbered": len(known.hits) - len(hits),
        "first": [asdict(hit) for hit in hits[:most_listed]],
    }  # fmt: skip


def _questions(folder: Path, limit: int | None = None) -> Iterator[Document]:
    for row in islice(read_rows(folder, "prompts"), limit):
        yield Document("\n".join(message["content"] for message in row["prompt"]), row["id"], row["source"])


def _item(row: Mapping[str, Any]) -> Item:
    question = "\n".join(message["content"] for message in row["prompt"])
    return Item(row["id"], row["source"], question, row["answer"], row["verifier"])


def stored_cases(folder: Path, items: Mapping[str, Item]) -> Iterator[Case]:
    """Stored rollouts that were judged, as cases. The verifier is the row's own or that of the prompt of its id."""
    for row in stored_rows(folder):
        item = items.get(str(row["id"]))
        verifier = row.get("verifier") or (item and item.verifier)
        if row["score"] is None or not verifier:  # never judged, or a prompt that is not audited
            continue
        own = Item(str(row["id"]), row.get("source") or "", text_of(row), row["answer"], verifier)
        yield Case(own, "rollout", row["completion"] or "", row["score"] >= 1)


def stored_rows(folder: Path) -> Iterator[Row]:
    """The rows of stored rollouts: a file, or all Parquet and JSONL files of a folder. Raises `ArtifactError`."""
    for where, row in _located(folder):
        missing = [name for name in _NEEDED if name not in row]
        if missing:
            raise ArtifactError(f"{where}: no column {missing[0]!r}; found {', '.join(row)}; expected stored rollouts")
        yield row


def _located(folder: Path) -> Iterator[tuple[str, Row]]:
    files = sorted([*folder.rglob("*.parquet"), *folder.rglob("*.jsonl")]) if folder.is_dir() else [folder]
    if not files or not files[0].exists():
        raise ArtifactError(f"{folder}: no rollouts; expected Parquet or JSONL files, as the stage `rl` stores them")
    for file in files:
        rows = read_jsonl if file.suffix == ".jsonl" else read_parquet
        yield from rows(file, "", Invalid("error"))
