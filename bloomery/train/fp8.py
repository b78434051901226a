"""FP8 training (arXiv 2504.03624 §2.3), applied to a decoder from outside: which linear layers, and what they saw.

In eight bits: the linear layers of attention, MLP, Mamba-2 and shared experts, except those of the first and last
layers. Not in eight bits: embedding, head, router, norms, convolution, scan, attention's own products, and the grouped
products of routed experts.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from bloomery.config import RUN_ONLY, Config, Field
from bloomery.errors import ConfigError, DivergenceError
from bloomery.train.fp8_linear import MULTIPLE, ROLES, Format, Fp8Product, multiplies

Telemetry = dict[str, dict[str, dict[str, float]]]
"""Linear layer → X, W, dY → `amax`; `saturated`, share of all numbers; `flushed` to zero, share of those not zero."""


class Fp8Config(Config):
    """How linear layers multiply under `precision: fp8`. The defaults are the published recipe."""

    forward: Format = Field(default="e4m3", description="format of inputs and weights")
    gradient: Format = Field(
        default="e5m2", description="format of output gradients, in the products for input and weight gradients"
    )
    scaling: Literal["current", "none"] = Field(
        default="current", description="current: each tensor by its own largest number; none: not at all"
    )
    high_precision_layers: int = Field(
        default=2, ge=0, description="layers at each end that stay in bf16 (2 layers: 4 products, with q, k, v as one)"
    )
    keep: tuple[str, ...] = Field(
        default=(), description="further linear layers that stay in bf16, by name, such as layers.7.mixer.down_proj"
    )
    measure_every_steps: int = Field(
        default=100, ge=0, json_schema_extra=RUN_ONLY,
        description="steps between measurements of amax, saturation and flush to zero; 0: never",
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Which linear layers of a model multiply in FP8, by name, and why the others do not."""

    chosen: dict[str, nn.Linear]
    ends: list[str]
    kept: list[str]
    misfits: list[str]

    @classmethod
    def of(cls, model: nn.Module, config: Fp8Config) -> Self:
        """Raises `ConfigError` for a name in `keep` that is no linear layer, and when nothing is left for FP8; not for
        a pipeline stage, which may have neither."""
        layers, edge, count = model.layers, config.high_precision_layers, model.config.num_layers
        found: dict[str, list[str]] = {"chosen": [], "ends": [], "kept": [], "misfits": []}
        linears = {
            (int(number), f"layers.{number}.{name}"): module
            for number, layer in layers.named_children()  # type: ignore[union-attr]
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        for (number, name), linear in linears.items():
            at_end = number < edge or number >= count - edge  # type: ignore[operator]
            fits = linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0
            reason = "ends" if at_end else "kept" if name in config.keep else "chosen" if fits else "misfits"
            found[reason].append(name)
        by_name = {name: linear for (_, name), linear in linears.items()}
        if len(layers) == count:  # type: ignore[arg-type]
            _check(config, by_name, found)
        sizes = [f"{name} {by_name[name].in_features}×{by_name[name].out_features}" for name in found["misfits"]]
        return cls({name: by_name[name] for name in found["chosen"]}, found["ends"], found["kept"], sizes)

    def describe(self, config: Fp8Config, device: torch.device) -> str:
        """One sentence or two for a person: how many, in which formats, real or emulated, and what is left out."""
        total = len(self.chosen) + len(self.ends) + len(self.kept) + len(self.misfits)
        real = multiplies(config.forward, config.gradient, device)
        how = "on FP8 units" if real else f"emulated, for this {device.type} cannot multiply them: slower"
        text = (
            f"{len(self.chosen)} of {total} linear layers in FP8 ({config.forward} forward, {config.gradient} gradients"
            f"{'' if config.scaling == 'current' else ', without scales'}; {how}); bf16: {len(self.ends)} at the ends"
        )
        text += f", {len(self.kept)} on request" if self.kept else ""
        return text + (f", not a multiple of {MULTIPLE}: {', '.join(self.misfits)}" if self.misfits else "")


def _check(config: Fp8Config, linears: dict[str, nn.Linear], found: dict[str, list[str]]) -> None:
    unknown = [name for name in config.keep if name not in linears]
    if unknown:
        raise ConfigError(f"fp8.keep: {unknown[0]} is no linear layer of this model; it has {', '.join(linears)}")
    if not found["chosen"]:
        raise ConfigError(
            f"precision: fp8 would change nothing: of {len(linears)} linear layers {len(found['ends'])} are in the "
            f"fp8.high_precision_layers {config.high_precision_layers} at the ends, {len(found['kept'])} in fp8.keep, "
            f"{len(found['misfits'])} have a size that is not a multiple of {MULTIPLE}; change that, or use bf16"
        )


class Fp8:
    """The linear layers of a model in FP8, where `installed`; nothing of the model changes elsewhere.

    Without a config, no layer is.
    """

    def __init__(self, model: nn.Module, config: Fp8Config | None):
        self.products: dict[str, Fp8Product] = {}
        if config is not None:
            scaled = config.scaling == "current"
            for name, linear in Plan.of(model, config).chosen.items():
                self.products[name] = Fp8Product(linear, config.forward, config.gradient, scaled)

    @contextmanager
    def installed(self, only: Collection[str] | None = None) -> Iterator[None]:
        """Inside, the chosen layers multiply in FP8, forward and backward; only: those of these names."""
        inside = [each for name, each in self.products.items() if only is None or name in only]
        for each in inside:
            each.linear.forward = each  # type: ignore[method-assign]
        try:
            yield
        finally:
            for each in inside:
                del each.linear.forward

    def begin(self, watch: bool) -> None:
        """A new step; watch: measure it, which costs a pass over every tensor."""
        for each in self.products.values():
            each.begin(watch)

    def check(self, outcome: float, where: str) -> None:
        """Raises `DivergenceError` naming `where` and the first tensor of this step with a NaN or infinity.

        outcome: a number of the step that is not finite if any tensor was, so that no healthy step waits for a device.
        """
        unused = [name for name, each in self.products.items() if not each.amax]
        assert not unused, f"the model's forward goes around its linear layers {unused}"
        if math.isfinite(outcome):
            return
        forward = [(name, role, each) for name, each in self.products.items() for role in ("X", "W")]
        backward = [(name, "dY", each) for name, each in reversed(self.products.items())]
        for name, role, each in forward + backward:
            amax = float(each.amax.get(role, 0.0))  # type: ignore[call-overload]
            if not math.isfinite(amax):
                raise DivergenceError(
                    f"{where}: the largest number of {role} of {name} is {amax}, so it has no FP8 scale; no weight was "
                    "changed; add the layer to fp8.keep, lower learning_rate, or look at this data"
                )

    def telemetry(self) -> Telemetry:
        """What was measured since `begin(watch=True)`; empty after `begin(watch=False)`."""
        places = [(name, role) for name, each in self.products.items() for role in ROLES if role in each.counts]
        rows = [_row(self.products[name], role) for name, role in places]  # type: ignore[arg-type]
        if not places:
            return {}
        found: Telemetry = {}
        for (name, role), (amax, saturated, flushed, present, count) in zip(
            places, torch.stack(rows).tolist(), strict=True
        ):
            shares = {"saturated": saturated / count, "flushed": flushed / present if present else 0.0}
            found.setdefault(name, {})[role] = {"amax": amax, **shares}
        return found


def _row(each: Fp8Product, role: str) -> Tensor:
    return torch.cat([each.amax[role].double()[None], each.counts[role].double()])  # type: ignore[index]


def summary(found: Telemetry) -> dict[str, float]:
    """`fp8_saturated/{role}` and `fp8_flushed/{role}`: mean over the layers."""
    numbers = {}
    for kind in ("saturated", "flushed"):
        for role in ROLES:
            shares = [layer[role][kind] for layer in found.values() if role in layer]
            numbers[f"fp8_{kind}/{role}"] = sum(shares) / len(shares)
    return numbers
