"""Two grids over the same ranks: one for attention and other dense layers, one for experts (arXiv 2504.14960, folding).

Both put the pipeline axis outermost, so their pipeline groups are the same by construction. The listing in the paper's
appendix puts the data axes outermost; its pipeline groups then differ wherever context·tensor ≠ expert·expert_tensor.
"""

import math
from collections.abc import Mapping as Sizes
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator

from bloomery.config import Config, Field, build
from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig

Family = Literal["dense", "expert"]
AXES: dict[str, tuple[str, ...]] = {
    "dense": ("pipeline", "data", "context", "tensor"),
    "expert": ("pipeline", "expert_data", "expert", "expert_tensor"),
}
"""Axes of each family, outermost first: the last one varies fastest from rank to rank."""
INNER = ("pipeline", "context", "tensor")


class Mapping(Config):
    """The degree of every axis. A layer family sees one grid of ranks, `AXES[family]`, in row-major order."""

    tensor: int = Field(1, ge=1, description="Ranks that share the heads and widths of a dense layer (count)")
    context: int = Field(1, ge=1, description="Ranks that share the tokens of one sequence (count)")
    data: int = Field(1, ge=1, description="Ranks with different sequences (count)")
    pipeline: int = Field(1, ge=1, description="Pipeline stages, each with its own layers (count)")
    expert_tensor: int = Field(1, ge=1, description="Ranks that share the width of one expert (count)")
    expert: int = Field(1, ge=1, description="Ranks with different experts (count)")
    expert_data: int = Field(0, ge=0, description="Ranks with the same experts; 0: as many as are left (count)")
    interleave: int = Field(1, ge=1, description="Pieces of the model that each pipeline stage holds (count)")
    zero: Literal[1, 3] = Field(1, description="Sharded over data: 1 optimizer state, 3 weights and gradients as well")
    replicate: int = Field(1, ge=1, description="Copies of what is sharded over data: HSDP (count)")
    recompute: bool = Field(False, description="Keep only the input of each layer for the backward pass")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("expert_data"):
            return given
        ranks = _product(given, ("tensor", "context", "data"))
        experts = _product(given, ("expert_tensor", "expert"))
        return {**given, "expert_data": ranks // experts} if ranks and experts and ranks % experts == 0 else given

    @model_validator(mode="after")
    def _same_ranks(self) -> Self:
        dense, expert = self.stage_size, self.expert_tensor * self.expert * self.expert_data
        if dense == expert:
            return self
        names = ("expert", "expert_tensor", "expert_data")
        sizes = {name: getattr(self, name) for name in names}
        degree, choices = _repair(sizes, dense, frozenset(() if self.expert_data else ("expert_data",)))
        raise ValueError(
            f"tensor·context·data = {self.tensor}·{self.context}·{self.data} = {dense}, but "
            f"expert_tensor·expert·expert_data = {self.expert_tensor}·{self.expert}·{self.expert_data or '?'}: both "
            f"grids must hold the same ranks of a stage; for {degree} {sizes[degree] or 'left out'} choose {choices}"
        )

    @model_validator(mode="after")
    def _whole_copies(self) -> Self:
        if self.data % self.replicate:
            choices = _listed(_divisors(self.data))
            raise ValueError(f"replicate {self.replicate} does not divide data {self.data}; choose {choices}")
        return self

    @classmethod
    def over(cls, world: int, where: str = "", **degrees: Any) -> "Mapping":
        """The mapping with these degrees over `world` ranks; `data` is what is left unless it is given.

        Raises `ConfigError` naming the equation that fails, the degree and the values that would do.
        """
        if "data" not in degrees and (inner := _product(degrees, INNER)):
            _check_fits(degrees, inner, world, where)
            degrees["data"] = world // inner
        mapping = build(cls, degrees, where)
        mapping.check_world(world)
        return mapping

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.stage_size * self.pipeline

    @property
    def token_unit(self) -> int:
        """What the tokens of a sequence are a multiple of: two equal runs a place on context, cut by tensor."""
        return 2 * self.context * self.tensor if self.context > 1 else self.tensor

    def sizes(self, family: Family) -> dict[str, int]:
        """Axis → degree of a family's grid, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES[family]}

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's place on every axis of both families."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        places: dict[str, int] = {}
        for family in ("dense", "expert"):
            sizes = self.sizes(family)
            places |= dict(zip(sizes, map(int, np.unravel_index(rank, tuple(sizes.values()))), strict=True))
        return places

    def rank(self, **places: int) -> int:
        """The rank at these places on the axes of one family; an axis left out counts as 0."""
        family: Family = "dense" if places.keys() <= set(AXES["dense"]) else "expert"
        assert places.keys() <= set(AXES[family]), f"{sorted(places)} are not axes of one family"
        sizes = self.sizes(family)
        return int(np.ravel_multi_index([places.get(axis, 0) for axis in sizes], tuple(sizes.values())))

    def groups(self, *axes: str) -> np.ndarray:
        """(groups, size): ranks that agree on all axes of their family but these, in the family's order."""
        return axis_groups(self.sizes("dense" if set(axes) <= set(AXES["dense"]) else "expert"), axes)

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The group along these axes that holds `rank`."""
        groups = self.groups(*axes)
        return tuple(map(int, groups[(groups == rank).any(axis=1)][0]))

    def expert_rank(self, number: int, num_experts: int) -> int:
        """Place on the expert axis that holds expert `number` of `num_experts`."""
        return number // (num_experts // self.expert)

    def check_world(self, world: int) -> None:
        """Raises `ConfigError` unless the degrees fill `world` ranks."""
        if self.world_size == world:
            return
        degree, choices = _repair({axis: getattr(self, axis) for axis in ("data", *INNER)}, world)
        raise ConfigError(
            f"tensor·context·data·pipeline = {self.tensor}·{self.context}·{self.data}·{self.pipeline} = "
            f"{self.world_size}, but there are {world} ranks; for {degree} {getattr(self, degree)} choose {choices}"
        )

    def check_model(self, model: ModelConfig, seq_len: int | None = None, where: str = "") -> None:
        """Raises `ConfigError` for the first degree that does not divide what it shares; seq_len: tokens, if known."""
        for degree, name, size in _shared(self, model):
            _check_divides(f"{where}.{degree}" if where else degree, getattr(self, degree), name, size)
        unit = self.token_unit
        if seq_len is not None and seq_len % unit:
            raise ConfigError(
                f"{where or 'mapping'}: a sequence of {seq_len} tokens is no multiple of {_unit(self)} = {unit}; "
                f"choose {seq_len - seq_len % unit or unit} or {seq_len + unit - seq_len % unit} tokens"
            )
        if self.pipeline * self.interleave > model.num_layers:
            raise ConfigError(
                f"{where or 'mapping'}: pipeline·interleave = {self.pipeline}·{self.interleave} is more than the "
                f"model's {model.num_layers} layers; choose at most {model.num_layers}"
            )


def axis_groups(sizes: Sizes[str, int], axes: tuple[str, ...]) -> np.ndarray:
    """(groups, size): the ranks of a row-major grid that agree on all its axes but `axes`."""
    names = list(sizes)
    ranks = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    kept = [place for place, name in enumerate(names) if name not in axes]
    free = [place for place, name in enumerate(names) if name in axes]
    return ranks.transpose(kept + free).reshape(-1, math.prod(sizes[name] for name in axes))


def _shared(mapping: Mapping, model: ModelConfig) -> list[tuple[str, str, int]]:
    """(degree, what it shares, how many there are) for every layer kind of the model."""
    found = []
    if "*" in model.pattern:
        found.append(("tensor", "num_attention_heads", model.num_attention_heads))
        # With fewer key heads than ranks, several ranks hold the same one.
        if mapping.tensor % model.num_key_value_heads:
            found.append(("tensor", "num_key_value_heads", model.num_key_value_heads))
    if "M" in model.pattern:
        # Whole groups, whose norm and whose B and C then need nothing of other ranks.
        found.append(("tensor", "n_groups", model.n_groups))
    if "-" in model.pattern:
        found.append(("tensor", "intermediate_size", model.intermediate_size))
    if "E" in model.pattern:
        found.append(("expert", "n_routed_experts", model.n_routed_experts))
        found.append(("expert_tensor", "moe_intermediate_size", model.moe_intermediate_size))
    else:
        found += [(degree, "one: the model has no experts to share;", 1) for degree in ("expert", "expert_tensor")]
    return found


def _check_fits(degrees: dict[str, int], inner: int, world: int, where: str) -> None:
    """Whether some whole number of `data` ranks is left."""
    if world % inner:
        given = {name: degrees.get(name, 1) for name in INNER}
        name = next((name for name, degree in given.items() if world % degree), max(given, key=lambda n: given[n]))
        raise ConfigError(
            f"{where or 'mapping'}: pipeline·context·tensor = {'·'.join(map(str, given.values()))} = {inner} does not "
            f"divide {world} ranks; for {name} {given[name]} choose "
            f"{_listed(_divisors(math.gcd(world, world * given[name] // inner)))}"
        )


def _check_divides(where: str, degree: int, name: str, size: int) -> None:
    if size % degree:
        found = name if name.startswith("one:") else f"{name} {size}"
        raise ConfigError(f"{where}: {degree} does not divide {found}; choose {_listed(_divisors(size))}")


def _unit(mapping: Mapping) -> str:
    if mapping.context > 1:
        return f"2·context·tensor = 2·{mapping.context}·{mapping.tensor}"
    return f"tensor = {mapping.tensor}"


def _repair(sizes: dict[str, int], total: int, unset: frozenset[str] = frozenset()) -> tuple[str, str]:
    """The degree to change so that the product becomes `total`, and the values that would do."""
    for name in sizes:
        rest = math.prod(size for other, size in sizes.items() if other not in {*unset, name})
        if name not in unset and total % rest == 0:
            values = [total // rest] if not unset else _divisors(total // rest)
            return name, _listed(values)
    name = next(iter(sizes))
    return name, _listed(_divisors(total)) + " and the others to match"


def _product(given: dict[str, Any], names: tuple[str, ...]) -> int:
    """Product of degrees as given; 0 where one is no positive whole number, which its own check will say."""
    values = [given.get(name, 1) for name in names]
    return math.prod(values) if all(isinstance(value, int) and value > 0 for value in values) else 0


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0] if number < 4096 else [
        1 << power for power in range(number.bit_length()) if number % (1 << power) == 0
    ]  # fmt: skip


def _listed(values: list[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
