"""The setting `parallel` of every stage that trains: how its work is spread over the ranks that torchrun starts."""

from typing import Literal, Self

from pydantic import model_validator

from bloomery.config import Config, Field
from bloomery.errors import ConfigError
from bloomery.parallel.context import ContextModes
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.world import TIMEOUT_SECONDS, world

_DEGREES = (
    "tensor", "context", "pipeline", "expert_tensor", "expert", "expert_data", "interleave", "zero", "replicate",
    "recompute",
)  # fmt: skip


class ParallelConfig(Config):
    """Degrees of every axis, as `bloomery plan` prints them. What a stage produces does not depend on them."""

    tensor: int = Field(default=1, ge=1, description="ranks that share the heads and widths of a dense layer (count)")
    context: int = Field(default=1, ge=1, description="ranks that share the tokens of one sequence (count)")
    data: int = Field(default=0, ge=0, description="ranks with different sequences (count); 0: as many as are left")
    pipeline: int = Field(default=1, ge=1, description="pipeline stages, each with its own layers (count)")
    expert_tensor: int = Field(default=1, ge=1, description="ranks that share the width of one expert (count)")
    expert: int = Field(default=1, ge=1, description="ranks with different experts (count)")
    expert_data: int = Field(default=0, ge=0, description="ranks with the same experts (count); 0: what is left")
    interleave: int = Field(default=1, ge=1, description="pieces of the model that each pipeline stage holds (count)")
    zero: Literal[1, 3] = Field(
        default=1, description="sharded over data: 1 optimizer state, 3 weights and gradients as well"
    )
    replicate: int = Field(default=1, ge=1, description="copies of what is sharded over data: HSDP (count)")
    recompute: bool = Field(default=False, description="keep only the input of each layer for the backward pass")
    across: ContextModes = Field(
        default=ContextModes(), description="how layers look across a sequence whose tokens several ranks hold"
    )
    dispatcher: Literal["auto", "all_to_all", "all_gather"] = Field(
        default="auto", description="how tokens reach the experts of other ranks; auto: the way that sends fewer bytes"
    )
    timeout_seconds: float = Field(
        default=TIMEOUT_SECONDS, gt=0, description="longest wait for another rank before the run stops, in seconds"
    )

    @model_validator(mode="after")
    def _heard(self) -> Self:
        if self.context == 1 and self.across != ContextModes():
            raise ValueError("across: without effect under context 1; give context more ranks, or leave it out")
        if self.pipeline == 1 and self.interleave > 1:
            raise ValueError(
                f"interleave: {self.interleave} is without effect under pipeline 1; give pipeline more ranks"
            )
        return self

    def mapping(self, ranks: int | None = None, where: str = "parallel") -> Mapping:
        """The mapping over `ranks`, by default all of this run. Raises `ConfigError` naming the degree at fault."""
        ranks = world().size if ranks is None else ranks
        degrees = {name: getattr(self, name) for name in _DEGREES} | ({"data": self.data} if self.data else {})
        if ranks == 1 and self.smallest > 1:
            raise ConfigError(
                f"{where}: these degrees are for {self.smallest} ranks or a multiple, but this is one process; start "
                f"it with `torchrun --nproc-per-node {self.smallest} --no-python bloomery …`"
            )
        return Mapping.over(ranks, where, **degrees)

    @property
    def smallest(self) -> int:
        """The fewest ranks that these degrees fill."""
        experts = self.expert_tensor * self.expert * max(1, self.expert_data)
        dense = self.tensor * self.context
        data = self.data or max(1, -(-experts // dense))
        return dense * data * self.pipeline
