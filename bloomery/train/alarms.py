"""What a change of data can do unseen: forgetting of the sources before it, and learning by heart of repeated ones."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from bloomery.config import Config, Field

_FORGETTING, _RECENT = "losses before the switch", "recent losses"


class Alarms(Config):
    """When a line is said about a source, or the run ends."""

    forgetting: float | None = Field(
        default=0.02, gt=0,
        description="rise of a source's validation loss over its lowest in the phases before, of 1; null: never",
    )  # fmt: skip
    memorizing: float | None = Field(
        default=0.2, gt=0,
        description="how far the training loss of a source read more than once may be below its validation loss, of 1; "
        "null: never",
    )  # fmt: skip
    window: int = Field(default=20, gt=0, description="steps over which a source's training loss is averaged")
    stop: bool = Field(default=False, description="end the run (exit code 3) instead of going on with a line")


class Watch:
    """Compares losses by source. What it remembers is plain JSON in `memory`, so that a resumed run says the same."""

    def __init__(self, limits: Alarms, memory: dict[str, Any]):
        self.limits, self.memory = limits, memory

    def trained(self, metrics: Mapping[str, float]) -> None:
        """One more step: `loss/{source}` of those that were in it."""
        recent = self.memory.setdefault(_RECENT, {})
        for name, loss in metrics.items():
            if name.startswith("loss/"):
                source = name.removeprefix("loss/")
                recent[source] = [*deque([*recent.get(source, []), loss], maxlen=self.limits.window)]

    def validated(self, found: Mapping[str, float], phase: int, epochs: Mapping[str, float]) -> dict[str, str]:
        """Source and alarm → what is wrong, for `validation_loss/{source}` measured in this phase, counted from 0."""
        alarms = {}
        for name, loss in found.items():
            if name.startswith("validation_loss/"):
                source = name.removeprefix("validation_loss/")
                alarms[f"forgetting/{source}"] = self._forgotten(source, loss, phase)
                alarms[f"memorizing/{source}"] = self._learnt_by_heart(source, loss, epochs.get(source, 0.0))
        return {name: text for name, text in alarms.items() if text is not None}

    def _forgotten(self, source: str, loss: float, phase: int) -> str | None:
        limit, lowest = self.limits.forgetting, self._lowest_before(source, loss, phase)
        if limit is None or lowest is None or loss <= lowest * (1 + limit):
            return None
        return (
            f"{source}: validation loss {loss:.4g}, {loss / lowest - 1:.1%} above the {lowest:.4g} of the phases "
            f"before (alarm at {limit:.1%}): it is being forgotten; keep more of it in this phase"
        )

    def _learnt_by_heart(self, source: str, loss: float, epochs: float) -> str | None:
        limit, recent = self.limits.memorizing, self.memory.get(_RECENT, {}).get(source, [])
        if limit is None or epochs <= 1 or not recent:
            return None
        trained = sum(recent) / len(recent)
        if trained >= loss * (1 - limit):
            return None
        return (
            f"{source}: after {epochs:.1f} epochs its training loss {trained:.4g} is {1 - trained / loss:.1%} below "
            f"its validation loss {loss:.4g} (alarm at {limit:.1%}): it is being learnt by heart; read it less often "
            "or add data"
        )

    def _lowest_before(self, source: str, loss: float, phase: int) -> float | None:
        """The lowest validation loss of the phases before this one; notes this one's for those that follow."""
        by_phase = self.memory.setdefault(_FORGETTING, {}).setdefault(source, {})
        by_phase[str(phase)] = min(loss, by_phase.get(str(phase), loss))
        before = [lowest for number, lowest in by_phase.items() if int(number) < phase]
        return min(before) if before else None
