"""Rollouts on disk, as a dataset of kind `traces`: what curation and the audit of verdicts read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bloomery import artifact
from bloomery.data.dataset import SCHEMAS
from bloomery.posttrain.rollouts import Rollouts, Sample


class RolloutStore:
    """Some steps' samples, one file a step: `rollouts-00010.parquet`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, step: int, rollouts: Rollouts) -> None:
        """Keep the samples that `step` learns from first."""
        table = pa.Table.from_pylist(list(_rows(step, rollouts)), schema=SCHEMAS["traces"])
        with artifact.replacing(self._file(step)) as temporary:
            pq.write_table(table, temporary)

    def has(self, step: int) -> bool:
        """Whether the samples of `step` are kept."""
        return self._file(step).exists()

    def _file(self, step: int) -> Path:
        return self.folder / f"rollouts-{step:05d}.parquet"

    def rewind(self, step: int) -> None:
        """Forget what a resumed run will write again: everything after `step`."""
        for file in self.folder.glob("rollouts-*.parquet"):
            if int(file.stem.rpartition("-")[2]) > step:
                file.unlink()


def _rows(step: int, rollouts: Rollouts) -> Iterator[dict[str, Any]]:
    for group in rollouts.groups:
        for number, s in enumerate(group):
            yield {
                "prompt": [{"role": m["role"], "content": m["content"]} for m in s.prompt.messages],
                "completion": s.completion.text, "answer": s.prompt.answer, "verifier": s.prompt.verifier,
                "score": s.verdict.score, "status": s.verdict.status, "reason": s.verdict.reason, "tokens": s.tokens,
                "finish_reason": s.completion.finish_reason, "step": step, "sample": number, "id": s.prompt.id,
                "source": s.prompt.source, "metadata": json.dumps(_more(s)),
            }  # fmt: skip


def _more(sample: Sample) -> dict[str, Any]:
    """Where the reward is more than the verdict: the form and what was paid."""
    if sample.paid is None or sample.form is None:
        return {}
    return {"domain": sample.prompt.domain, "format": sample.form.correct, "reward": sample.paid.score}
