"""What a pretraining run has read, over all ranks and attempts, checked against its plan before every checkpoint."""

from bloomery.data.blended import BlendedRows
from bloomery.data.ledger import Ledger
from bloomery.errors import ArtifactError
from bloomery.train.loop import TrainState
from bloomery.train.spread import whole_ledger

_LEDGER, _PLAN = "ledger", "plan"


class Account:
    """Keeps the ledger of `rows` in `state.extra`, beside the identity of the plan that it belongs to."""

    def __init__(self, rows: BlendedRows, state: TrainState):
        self.rows, self.state = rows, state
        self._before = Ledger(rows.plan.sources, rows.plan.rows)
        self._start = 0

    def open(self) -> None:
        """Call once when `state` is restored: go on from what was read before.

        Raises `ArtifactError` where the checkpoint has read other sequences than this plan begins with.
        """
        extra, position = self.state.extra, self.state.position
        if extra.get(_PLAN, self.rows.identity(position)) != self.rows.identity(position):
            raise ArtifactError(
                f"the checkpoint at sequence {position} has read other data than this blend begins with: its weights, "
                "sources, rows or seed differ there; blend the same first phase, or go on with `after`"
            )
        if _LEDGER in extra:
            self._before.add_json(extra[_LEDGER])
        else:
            self._start = position  # a checkpoint of a version that kept no ledger

    def ledger(self) -> Ledger:
        """All that was read, by all ranks."""
        return self._before + whole_ledger(self.rows.ledger, self.state.parallel)

    def close(self) -> None:
        """Check what was read and note it for the next checkpoint. Raises `DivergenceError` at the first difference."""
        found, position = self.ledger(), self.state.position
        found.verify(self.rows.plan, self._start, position)
        self.state.extra |= {_LEDGER: found.to_json(), _PLAN: self.rows.identity(position)}
