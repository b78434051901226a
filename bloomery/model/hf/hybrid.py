"""What the families around Mamba-2 share: `backbone.` names like ours, and how they write the clamp of dt."""

import math
from abc import ABC
from collections.abc import Mapping
from typing import Any

from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig
from bloomery.model.hf.family import Family

TIME_STEPS = ("time_step_limit", "time_step_min", "time_step_max", "time_step_floor")
_MARKS = {"in_proj": "M", "q_proj": "*", "gate": "E", "up_proj": "-"}


class Hybrid(Family, ABC):
    """A family with one residual layer per mixer, named `backbone.layers.{i}.mixer`."""

    def file_name(self, config: ModelConfig, name: str) -> str:
        if name.startswith("lm_head."):
            return name
        return "backbone." + ("norm_f.weight" if name == "norm.weight" else name)

    def canonical(self, name: str) -> str | None:
        if name.startswith("mtp."):
            return None
        name = "backbone." + name.removeprefix("model.") if name.startswith("model.") else name
        return name.replace("backbone.embedding.", "backbone.embeddings.")

    def found_pattern(self, names: set[str]) -> dict[int, str]:
        found = {}
        for name in names:
            parts = name.split(".")
            if name.startswith("backbone.layers.") and parts[3] == "mixer" and parts[4] in _MARKS:
                found[int(parts[2])] = _MARKS[parts[4]]
        return found


def read_limit(value: Any) -> tuple[float, float]:
    """`time_step_limit`; transformers writes infinity as `{"__float__": "Infinity"}`."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ConfigError(f"time_step_limit: {value!r}, expected the two bounds of dt, such as [0.0, Infinity]")
    low, high = (float(bound["__float__"] if isinstance(bound, dict) else bound) for bound in value)
    return low, high


def write_limit(limit: tuple[float, float]) -> list[Any]:
    """The inverse of `read_limit`."""
    return [{"__float__": "Infinity"} if bound == math.inf else bound for bound in limit]


def read_norm_eps(raw: Mapping[str, Any]) -> float:
    """Read by presence, in the order in which the released classes look."""
    return next((raw[key] for key in ("layer_norm_epsilon", "rms_norm_eps", "norm_eps") if key in raw), 1e-5)
