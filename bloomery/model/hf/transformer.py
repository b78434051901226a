"""What the families around Llama share: attention and MLP in turn, Llama's names. They differ in a few switches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig
from bloomery.model.hf.family import TOKENS, Family, present, reasons
from bloomery.model.hf.rotary import read_rope, write_rope

_SIZES = (
    "vocab_size", "hidden_size", "num_attention_heads", "tie_word_embeddings", "max_position_embeddings",
    "initializer_range", *TOKENS,
)  # fmt: skip
_ATTENTION = {f"{n}_proj": f"self_attn.{n}_proj" for n in "qkvo"} | {f"{n}_norm": f"self_attn.{n}_norm" for n in "qk"}
_MLP = {f"{n}_proj": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
_TOP = {"embeddings": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_NEVER: Mapping[str, Any] = {"mlp_bias": False, "attention_bias": False, "qkv_bias": False, "qk_norm": False}
_EXPERTS: Mapping[str, Any] = {
    "router_activation": "softmax", "routed_scaling_factor": 1.0, "n_group": 1, "moe_latent_size": None,
}  # fmt: skip
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """How a family writes its experts.

    Attributes:
        count, inner: keys of `config.json` for the number of experts and the width of one.
        module: where router and experts are.
        projections: gate, up and down of one expert.
        mixed: a layer may have an MLP instead (`decoder_sparse_step`, `mlp_only_layers`).
        shared: each layer has a shared expert with a gate.
    """

    count: str
    inner: str = "moe_intermediate_size"
    module: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    mixed: bool = True
    shared: bool = False

    @property
    def by_projection(self) -> dict[str, str]:
        """Our names of an expert's matrices → the file's."""
        return dict(zip(("gate_proj", "up_proj", "down_proj"), self.projections, strict=True))

    def part(self, name: str) -> str:
        """`experts.up_proj`, `gate`, `shared_experts.up_proj`, `shared_expert_gate` → under the layer's prefix."""
        if name.startswith("experts."):
            name = f"experts.{self.by_projection[name.removeprefix('experts.')]}"
        return f"{self.module}.{name.replace('shared_experts.', 'shared_expert.')}"


@dataclass(frozen=True, kw_only=True)
class Transformer(Family):
    """One of the families around Llama.

    Attributes:
        always: fields of `ModelConfig` that the class has no choice in, where they differ from a plain Llama layer.
        optional: keys of `config.json`, named as in `ModelConfig`, with the class's default.
        window: where a sliding window applies. `all`: `sliding_window` in every layer; `switched`: the same, if
            `use_sliding_window`; `after`: then from layer `max_window_layers` on, or as `layer_types` lists;
            `listed`: as `layer_types` lists.
        rope_theta: the class's default base of rotary positions.
        experts: names of the experts, in a family that has them.
    """

    always: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    window: Literal["none", "all", "switched", "after", "listed"] = "none"
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    experts: ExpertNames | None = None
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu", "attention_dropout": 0.0})

    @property
    def _given(self) -> dict[str, Any]:
        """Fields without a choice."""
        experts = _EXPERTS if self.experts else {}
        given = {"mlp_gated": True, "mlp_hidden_act": "silu", **_NEVER, **experts, **self.always}
        return {key: value for key, value in given.items() if key not in self.optional}

    def refusals(self, config: ModelConfig) -> list[str]:
        found = {
            self._wanted_pattern(config): not self._fits(config.pattern),
            "it always has rotary positions": config.rope is None,
            "it has no sliding window": self.window == "none" and config.sliding_window is not None,
        }
        for key, value in self._given.items():
            found[f"its {key} is always {value!r}"] = getattr(config, key) != value
        if self.experts:
            gated = config.shared_expert_gate and config.n_shared_experts == 1
            missing = "E" in config.pattern and not gated
            found["its E layers always have one shared expert with a gate"] = self.experts.shared and missing
            found["it has no shared experts"] = not self.experts.shared and config.n_shared_experts > 0
        return reasons(found)

    def _wanted_pattern(self, config: ModelConfig) -> str:
        second = "'*-'" if self.experts is None else "'*-' or '*E'" if self.experts.mixed else "'*E'"
        return f"pattern {config.pattern!r} is not {second} repeated" + (
            " with an E somewhere" if self.experts and self.experts.mixed else ""
        )

    def _fits(self, pattern: str) -> bool:
        kinds = "-" if self.experts is None else "-E" if self.experts.mixed else "E"
        whole = len(pattern) % 2 == 0 and set(pattern[::2]) == {"*"} and set(pattern[1::2]) <= set(kinds)
        return whole and ("E" in pattern or self.experts is None)

    def read_config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        heads = raw["num_attention_heads"]
        fields = present(raw, _SIZES) | self._given | {key: raw.get(key, self.optional[key]) for key in self.optional}
        return fields | self._read_layers(raw) | {
            "family": self.model_type,
            "num_key_value_heads": raw.get("num_key_value_heads") or heads,
            "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
            "sliding_window": self._read_window(raw),
            "norm_eps": raw.get("rms_norm_eps", self.norm_eps),
            "rope": read_rope(raw, self.rope_theta),
        }  # fmt: skip

    def _read_layers(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The pattern and the sizes of MLPs and experts."""
        layers, names = raw["num_hidden_layers"], self.experts
        if names is None:
            return {"pattern": "*-" * layers, "intermediate_size": raw["intermediate_size"]}
        fields = {
            "n_routed_experts": raw.get(names.count, raw.get("num_local_experts")),
            "num_experts_per_tok": raw["num_experts_per_tok"],
            "moe_intermediate_size": raw[names.inner],
        }
        if names.shared:
            shared = raw["shared_expert_intermediate_size"]
            fields |= {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": shared, "shared_expert_gate": True}
        if not names.mixed:
            return fields | {"pattern": "*E" * layers}
        step, dense = raw.get("decoder_sparse_step") or 1, set(raw.get("mlp_only_layers") or ())
        kinds = ["-" if layer in dense or (layer + 1) % step else "E" for layer in range(layers)]
        return fields | {"pattern": "*" + "*".join(kinds), "intermediate_size": raw["intermediate_size"]}

    def _read_window(self, raw: Mapping[str, Any]) -> int | None:
        window = raw.get("sliding_window") or None
        if self.window == "all":
            return window
        if self.window == "none" or not raw.get("use_sliding_window"):
            return None
        sliding = self._sliding_layers(raw)
        if len(set(sliding)) > 1:
            raise ConfigError(
                f"layer_types: {sum(sliding)} of {len(sliding)} attention layers have a sliding window; a window must "
                "hold for all or none here. With use_sliding_window: false the model is the same on texts of up to "
                f"{window} tokens"
            )
        return window if all(sliding) else None

    def _sliding_layers(self, raw: Mapping[str, Any]) -> list[bool]:
        """Which attention layers have the window."""
        layers = raw["num_hidden_layers"]
        if self.window == "switched":
            return [True] * layers
        if raw.get("layer_types"):
            return [kind == _SLIDING for kind in raw["layer_types"]]
        if self.window == "listed":
            raise ConfigError("layer_types: missing; with use_sliding_window, list the kind of every attention layer")
        return [layer >= raw["max_window_layers"] for layer in range(layers)]

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        assert config.rope is not None
        return {key: getattr(config, key) for key in (*_SIZES, *self.optional)} | {
            "num_hidden_layers": config.num_layers // 2,
            "intermediate_size": config.intermediate_size,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "hidden_act": config.mlp_hidden_act,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": write_rope(config.rope),
            "attention_dropout": 0.0,
            **self._write_window(config),
            **self._write_experts(config),
        }  # fmt: skip

    def _write_window(self, config: ModelConfig) -> dict[str, Any]:
        if self.window == "none":
            return {}
        window, layers = config.sliding_window, config.num_layers // 2
        raw: dict[str, Any] = {"sliding_window": window}
        if self.window != "all":
            raw["use_sliding_window"] = window is not None
        if self.window in ("after", "listed"):
            raw["max_window_layers"] = 0 if window else layers
            raw["layer_types"] = [_SLIDING if window else _FULL] * layers
        return raw

    def _write_experts(self, config: ModelConfig) -> dict[str, Any]:
        names = self.experts
        if names is None:
            return {}
        raw: dict[str, Any] = {
            names.count: config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            names.inner: config.moe_intermediate_size,
        }
        if names.shared:
            raw["shared_expert_intermediate_size"] = config.moe_shared_expert_intermediate_size
        if names.mixed:
            dense = [layer for layer, kind in enumerate(config.pattern[1::2]) if kind == "-"]
            raw |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
        return raw

    def file_name(self, config: ModelConfig, name: str) -> str:
        if not name.startswith("layers."):
            module, _, leaf = name.rpartition(".")
            return f"{_TOP[module]}.{leaf}"
        _, number, part = name.split(".", 2)
        return f"model.layers.{int(number) // 2}.{self._part(config.pattern[int(number)], part)}"

    def _part(self, kind: str, part: str) -> str:
        if part == "norm.weight":
            return "input_layernorm.weight" if kind == "*" else "post_attention_layernorm.weight"
        part = part.removeprefix("mixer.")
        if kind == "E":
            assert self.experts is not None
            return self.experts.part(part)
        module, _, leaf = part.partition(".")
        return f"{(_ATTENTION if kind == '*' else _MLP)[module]}.{leaf}"

    def canonical(self, name: str) -> str | None:
        if name.endswith("rotary_emb.inv_freq"):
            return None
        names = self.experts
        if names is None or names.module == "mlp":
            return name
        name = name.replace(".mlp.", f".{names.module}.")
        head, experts, tail = name.partition(".experts.")
        for ours, theirs in names.by_projection.items():
            tail = tail.replace(ours, theirs)
        return head + experts + tail

    def found_pattern(self, names: set[str]) -> dict[int, str]:
        found = {}
        for name in names:
            if name.startswith("model.layers."):
                _, _, layer, module, *rest = name.split(".")
                if module == "self_attn":
                    found[2 * int(layer)] = "*"
                elif module == "mlp" and rest[0] in _MLP:
                    found[2 * int(layer) + 1] = "-"
                elif self.experts and module == self.experts.module:
                    found[2 * int(layer) + 1] = "E"
        return found
