"""What runs of small models have tried and found: the table that a blend is searched from."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bloomery.errors import ArtifactError, ConfigError

LOSS, SCORE = "loss/", "score/"
_PHASE, _SHARE, _EPOCHS = "phase{}/{}", "share/phase{}", "epochs/{}"
_LEAST_EPOCHS = 0.01
"""Below this an epoch count says nothing: a source that is left out counts as seen to one part in a hundred."""


@dataclass(frozen=True)
class Budget:
    """What a blend must keep to.

    tokens: length of training; unique_tokens: (sources,) what each holds; max_epochs: (sources,) how often it may be
    gone through, infinite where nothing was said; shares: of the phases, which sum to 1; floors: (phases, sources)
    least weight of a source in a phase.
    """

    sources: tuple[str, ...]
    tokens: float
    unique_tokens: np.ndarray
    max_epochs: np.ndarray
    shares: np.ndarray
    floors: np.ndarray

    @property
    def largest(self) -> np.ndarray:
        """(sources,) the largest share of all tokens that the epochs allow."""
        return self.max_epochs * self.unique_tokens / self.tokens

    def epochs(self, parts: np.ndarray) -> np.ndarray:
        """(n, sources) from (n, phases, sources) shares of all tokens."""
        return parts.sum(1) * self.tokens / self.unique_tokens


@dataclass(frozen=True)
class Table:
    """One row for each run.

    parts: (n, phases, sources) shares of all tokens, which sum to 1 over a row; epochs: (n, sources) of the run;
    found: (n, targets) losses and scores; targets: their names, `loss/…` or `score/…`.
    """

    sources: tuple[str, ...]
    parts: np.ndarray
    epochs: np.ndarray
    targets: tuple[str, ...]
    found: np.ndarray

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def groups(self) -> np.ndarray:
        """(n,) equal for runs of the same blend: they differ in seed alone."""
        rows = np.round(self.parts.reshape(len(self), -1), 9)
        return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)

    @property
    def unknowns(self) -> int:
        """How many numbers of a blend the runs vary."""
        centered = self.parts.reshape(len(self), -1)
        return int(np.linalg.matrix_rank(centered - centered.mean(0), tol=1e-6))


def features(parts: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """(n, phases × sources + phases − 1 + 2 × sources): what the laws see.

    Weights in each phase, shares of the later phases, ln epochs, and ln of what exceeds the first epoch, from which on
    a source only repeats itself.
    """
    shares = parts.sum(2)
    weights = parts / np.maximum(shares, 1e-12)[:, :, None]
    seen, repeated = np.log(np.maximum(epochs, 0) + _LEAST_EPOCHS), np.log(np.maximum(epochs, 1))
    return np.concatenate([weights.reshape(len(parts), -1), shares[:, 1:], seen, repeated], axis=1)


def read_table(path: Path, budget: Budget) -> Table:
    """A table from CSV, JSONL or Parquet.

    Columns: `phaseN/SOURCE`, the weight of a source in phase N, relative to the others; a source without a column has
    weight 0 there. `share/phaseN`, the length of the phase, relative; the plan's where left out. `loss/NAME` or
    `score/NAME`, what the run has found. `epochs/SOURCE`, where the run's sources were not downsampled with its tokens;
    else it repeats them as often as the plan. Others, such as a seed, are passed over.
    Raises `ArtifactError` naming row and column.
    """
    columns = _columns(path)
    phases = len(budget.shares)
    _refuse_unknown(path, columns, budget.sources, phases)
    weights = np.stack(
        [[_numbers(path, columns, _PHASE.format(p + 1, name), 0.0) for name in budget.sources] for p in range(phases)]
    ).transpose(2, 0, 1)
    shares = np.stack([_numbers(path, columns, _SHARE.format(p + 1), budget.shares[p]) for p in range(phases)], 1)
    for what, values in (("weights", weights.reshape(-1, len(budget.sources))), ("shares", shares)):
        bad = np.flatnonzero((values < 0).any(1) | (values.sum(1) <= 0))
        if len(bad):
            row = int(bad[0]) // (phases if what == "weights" else 1)
            raise ArtifactError(f"{path}: row {row + 1}: {what} of {values[bad[0]].tolist()}; expected numbers of at "
                                "least 0, not all of them 0, for every phase")  # fmt: skip
    parts = weights / weights.sum(2, keepdims=True) * (shares / shares.sum(1, keepdims=True))[:, :, None]
    epochs = budget.epochs(parts)
    for number, name in enumerate(budget.sources):
        if _EPOCHS.format(name) in columns:
            epochs[:, number] = _numbers(path, columns, _EPOCHS.format(name), 0.0)
    targets = tuple(name for name in columns if name.startswith((LOSS, SCORE)))
    if not targets:
        raise ArtifactError(f"{path}: no column says what a run has found; expected loss/NAME or score/NAME")
    return Table(budget.sources, parts, epochs, targets, np.stack([_numbers(path, columns, n) for n in targets], 1))


def _columns(path: Path) -> Mapping[str, Sequence[object]]:
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; expected a table of runs as CSV, JSONL or Parquet")
    if path.suffix not in _READERS:
        raise ArtifactError(f"{path}: found a file of type {path.suffix or 'none'}; expected {', '.join(_READERS)}")
    try:
        columns = _READERS[path.suffix](path)
    except ValueError as error:  # json's and pyarrow's
        raise ArtifactError(f"{path}: not readable as {path.suffix}: {error}; write the table anew") from None
    if not columns or not next(iter(columns.values())):
        raise ArtifactError(f"{path}: the table has no rows")
    return columns


def _read_jsonl(path: Path) -> Mapping[str, Sequence[object]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> Mapping[str, Sequence[object]]:
    import pyarrow.parquet as parquet

    return parquet.read_table(path).to_pydict()


def _read_csv(path: Path) -> Mapping[str, Sequence[object]]:
    import pyarrow.csv as csv

    return csv.read_csv(path).to_pydict()


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _refuse_unknown(path: Path, columns: Mapping[str, object], sources: Sequence[str], phases: int) -> None:
    known = {_PHASE.format(p + 1, name) for p in range(phases) for name in sources}
    known |= {_SHARE.format(p + 1) for p in range(phases)} | {_EPOCHS.format(name) for name in sources}
    for name in columns:
        if name.startswith(("phase", "share/", "epochs/")) and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the plan has {phases} phases of {', '.join(sources)}"
            raise ConfigError(f"{path}: column {name}: the plan has no such phase or source; {hint}")
    if not any(name.startswith("phase") for name in columns):
        raise ConfigError(f"{path}: no weights; expected columns such as {_PHASE.format(1, sources[0])}")


def _numbers(path: Path, columns: Mapping[str, Sequence[object]], name: str, default: float | None = None
             ) -> np.ndarray:  # fmt: skip
    """(n,) a column of finite numbers; `default` everywhere where there is none."""
    if name not in columns:
        assert default is not None, name
        return np.full(len(next(iter(columns.values()))), float(default))
    for row, value in enumerate(columns[name], 1):
        if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
            raise ArtifactError(f"{path}: row {row}, column {name}: found {value!r}, expected a finite number")
    return np.array(columns[name], dtype=np.float64)
