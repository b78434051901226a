"""Llama (`model_type: llama`): the pattern is `*-` repeated, gated SiLU MLPs, rotary positions."""

from typing import Any

from bloomery.model.config import ModelConfig, RopeConfig

ARCHITECTURE = "LlamaForCausalLM"
TIES_HEAD = True
"""Its class fills `lm_head` from the embeddings when `tie_word_embeddings` is set; the file does not hold it then."""

FIXED = {"hidden_act": "silu", "attention_dropout": 0.0, "pretraining_tp": 1}
"""Keys of `config.json` that this family can only have at these values."""

_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "attention_bias", "mlp_bias",
    "tie_word_embeddings", "max_position_embeddings", "initializer_range",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
_ATTENTION = {f"mixer.{n}_proj": f"self_attn.{n}_proj" for n in "qkvo"} | {"norm": "input_layernorm"}
_MLP = {f"mixer.{n}_proj": f"mlp.{n}_proj" for n in ("gate", "up", "down")} | {"norm": "post_attention_layernorm"}
_TOP = {"embeddings": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}


def refusals(config: ModelConfig) -> list[str]:
    """Why the Hugging Face class cannot hold this model; empty when it can."""
    layers, rest = divmod(config.num_layers, 2)
    found = {
        f"pattern {config.pattern!r} is not '*-' repeated": rest or config.pattern != "*-" * layers,
        "its MLPs are gated SiLU": not config.mlp_gated or config.mlp_hidden_act != "silu",
        "it always has rotary positions": config.rope is None,
        "it has no query/key norm": config.qk_norm,
        "it has no sliding window": config.sliding_window is not None,
    }
    return [reason for reason, applies in found.items() if applies]


def read_config(raw: dict[str, Any]) -> dict[str, Any]:
    """`config.json` → the fields of `ModelConfig`."""
    fields = {key: raw[key] for key in _SAME if key in raw}
    heads = raw["num_attention_heads"]
    return fields | {
        "family": "llama",
        "pattern": "*-" * raw["num_hidden_layers"],
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "mlp_gated": True,
        "mlp_hidden_act": "silu",
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope": _read_rope(raw),
    }


def _read_rope(raw: dict[str, Any]) -> dict[str, Any]:
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    scaling.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    return scaling


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of `ModelConfig` → `config.json`."""
    assert config.rope is not None
    return {key: getattr(config, key) for key in _SAME} | {
        "num_hidden_layers": config.num_layers // 2,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.mlp_hidden_act,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _write_rope(config.rope),
        "attention_dropout": 0.0,
    }


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    keys = {
        "default": ("rope_theta", "rope_type"),
        "linear": ("rope_theta", "rope_type", "factor"),
        "llama3": tuple(RopeConfig.model_fields),
    }
    return {key: getattr(rope, key) for key in keys[rope.rope_type]}


def file_name(config: ModelConfig, name: str) -> str:
    """The parameter's name in the file, without expert numbers."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{_TOP[module]}.{leaf}"
    _, number, part = module.split(".", 2)
    names = _ATTENTION if config.pattern[int(number)] == "*" else _MLP
    return f"model.layers.{int(number) // 2}.{names[part]}.{leaf}"


def canonical(name: str) -> str | None:
    """The present-day form of a name found in a file; `None` for tensors that are no part of the model."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def found_pattern(names: set[str]) -> dict[int, str]:
    """What the tensor names say each layer is."""
    kinds = {"self_attn": ("*", 0), "mlp": ("-", 1)}
    found = {}
    for name in names:
        parts = name.split(".")
        if name.startswith("model.layers.") and parts[3] in kinds:
            kind, offset = kinds[parts[3]]
            found[2 * int(parts[2]) + offset] = kind
    return found
