"""From a planned blend to a better one: what the plan allows, the search, and the answer for people and programs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bloomery.data.blend_law import Bounded
from bloomery.data.blend_search import Proposal, search
from bloomery.data.blend_table import Budget, read_table
from bloomery.data.explain import Explanation
from bloomery.data.plan import Plan, make_plan
from bloomery.errors import ConfigError


def budget_of(planned: Explanation) -> Budget:
    """Sizes, caps, floors and phase lengths of a plan. Raises `ConfigError` where a source's size is not known."""
    names = planned.plan.sources
    unknown = [name for name in names if planned.unique_tokens.get(name) is None]
    if unknown:
        raise ConfigError(
            f"sources.{unknown[0]}.unique_tokens: missing; epochs follow from it, so no blend can be searched without"
        )
    caps = [planned.max_epochs.get(name) for name in names]
    lengths = np.diff([0, *planned.phase_ends])
    floors = planned.floors or [{}] * len(lengths)
    return Budget(
        names,
        tokens=float(sum(planned.tokens(planned.plan.drawn))),
        unique_tokens=np.array([planned.unique_tokens[name] for name in names], dtype=np.float64),
        max_epochs=np.array([np.inf if cap is None else cap for cap in caps]),
        shares=lengths / lengths.sum(),
        floors=np.array([[phase.get(name, 0.0) for name in names] for phase in floors]),
    )


@dataclass(frozen=True)
class Proposed:
    """A proposal with the plan that it makes in the place of the given one."""

    proposal: Proposal
    before: Explanation
    plan: Plan

    @property
    def phases(self) -> list[dict[str, Any]]:
        """As the settings of a blend hold them."""
        return _phases(self.proposal, self.plan.sources)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        found = self.proposal
        return {
            "law": found.law,
            "validation": {
                law: {"rank": _pair(one.rank), "skill": _pair(one.skill), "error": _pair(one.error)}
                for law, one in found.validation.items()
            },
            "phases": self.phases,
            "epochs": dict(zip(self.plan.sources, self.plan.epochs.tolist(), strict=True)),
            "objective": _pair(found.objective), "targets": dict(found.targets),
            "best_tried": None if found.tried is None else _pair(found.tried),
            "gain": None if found.gain is None else _pair(found.gain),
        }  # fmt: skip

    def text(self) -> str:
        """For people: how far to believe it, the blend, and what it should give."""
        found = self.proposal
        lines = ["law          rank correlation        variance explained, both on runs held out"]
        for law, one in found.validation.items():
            mark = "  <- taken" if law == found.law else ""
            lines.append(f"{law:<12} {_text(one.rank):<23} {_text(one.skill)}{mark}")
        lines += ["", "phases:"]
        for phase in self.phases:
            weights = ", ".join(f"{name}: {weight:.5g}" for name, weight in phase["weights"].items())
            lines += [f"  - share: {phase['share']:.5g}", f"    weights: {{{weights}}}"]
        lines += ["", "epochs: " + ", ".join(map(self._epochs, self.plan.sources, self.plan.epochs.tolist()))]
        lines.append(f"objective, lower is better: {_text(found.objective)} predicted for a run of it")
        if found.tried is None or found.gain is None:
            return "\n".join(
                [*lines, "no blend of the table keeps all caps and floors, so there is none to compare with"]
            )
        lines.append(
            f"best blend tried that keeps the caps: {found.tried.value:.4g}; predicted gain {_text(found.gain)}"
        )
        if found.gain.low <= 0:
            lines.append("the gain may be nothing: its interval holds 0")
        return "\n".join(lines)

    def _epochs(self, name: str, epochs: float) -> str:
        cap = self.before.max_epochs.get(name)
        return f"{name} {epochs:.3g}" + ("" if cap is None else f" of {cap:g}")


def propose(table: Path, planned: Explanation, wanted: Mapping[str, float], draws: int, seed: int) -> Proposed:
    """Search the blend of `planned` anew with what the runs in `table` have found."""
    budget = budget_of(planned)
    found = search(read_table(table, budget), budget, wanted, draws, seed)
    old = planned.plan
    phases = [(phase["share"], phase["weights"]) for phase in _phases(found, old.sources)]
    plan = make_plan(old.sources, old.rows, planned.row_tokens, phases, old.num_sequences, old.seed)
    most = budget.max_epochs * np.array(old.rows) + 1  # a sequence may be added by rounding
    assert (plan.drawn <= most).all(), f"proposed {plan.drawn.tolist()}, at most {most.tolist()}"
    return Proposed(found, planned, plan)


def _phases(found: Proposal, sources: tuple[str, ...]) -> list[dict[str, Any]]:
    """Weights to five figures; one too small for the search to have meant it is left out."""
    return [
        {
            "share": float(f"{share:.5g}"),
            "weights": {name: float(f"{w:.5g}") for name, w in zip(sources, row.tolist(), strict=True) if w > 1e-5},
        }
        for share, row in zip(found.shares.tolist(), found.weights, strict=True)
    ]


def _pair(number: Bounded) -> dict[str, float]:
    return {"value": number.value, "low": number.low, "high": number.high}


def _text(number: Bounded) -> str:
    return f"{number.value:.4g} ({number.low:.4g} to {number.high:.4g})"
