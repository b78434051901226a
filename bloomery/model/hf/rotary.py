"""Rotary positions in `config.json`: `rope_parameters` of transformers 5, `rope_scaling` and `rope_theta` before."""

import math
from collections.abc import Mapping
from typing import Any

from bloomery.errors import ConfigError
from bloomery.model.config import RopeConfig

_OLD_CONTEXT = "original_max_position_embeddings"
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _OLD_CONTEXT, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", _OLD_CONTEXT, "beta_fast", "beta_slow", "truncate", "attention_factor"),
}
_REFUSED = {
    "dynamic": "it turns every position by an angle that depends on the length of the text, so keys already held go "
    "stale; set rope_type to yarn or linear, or remove the scaling and stay within the trained context",
    "longrope": "only Phi models have it; load the model with transformers",
}


def read_rope(raw: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """The fields of `RopeConfig`; `theta` is the class's default base. Raises `ConfigError` for unknown rules."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    fields = {key: value for key, value in found.items() if value is not None}
    kind = fields.pop("type", "default")
    kind = fields.setdefault("rope_type", kind)
    if kind not in _KEYS:
        reason = _REFUSED.get(kind, "no family here has it; load the model with transformers")
        raise ConfigError(f"rope_parameters: rope_type {kind!r} is not supported, only {', '.join(_KEYS)}: {reason}")
    partial = fields.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor {partial!r} is not supported; only 1.0 is, all channels turned")
    fields.setdefault("rope_theta", raw.get("rope_theta") or theta)
    if kind in ("llama3", "yarn"):
        fields.setdefault(_OLD_CONTEXT, raw.get(_OLD_CONTEXT) or raw["max_position_embeddings"])
    return _yarn(fields) if kind == "yarn" else fields


def _yarn(fields: dict[str, Any]) -> dict[str, Any]:
    """`mscale` and `mscale_all_dim`, where both are given, are another way to write the attention factor."""
    scales = [fields.pop(key, None) for key in ("mscale", "mscale_all_dim")]
    if "attention_factor" not in fields and all(scales):
        one, other = (0.1 * scale * math.log(fields["factor"]) + 1.0 for scale in scales)
        fields["attention_factor"] = one / other
    return fields


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` as transformers checks them: no key that the rule does not use."""
    values = {key: getattr(rope, key) for key in ("rope_theta", "rope_type", *_KEYS[rope.rope_type])}
    return {key: value for key, value in values.items() if value is not None}
