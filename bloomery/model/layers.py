"""The MLP mixer."""

from torch import Tensor, nn

from bloomery.model import activation
from bloomery.model.config import ModelConfig


class MLP(nn.Module):
    """The `-` mixer: down(act(up(x))), or with a gate down(act(gate(x))·up(x))."""

    def __init__(self, config: ModelConfig, intermediate_size: int):
        super().__init__()
        d, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, intermediate_size, bias=bias) if config.mlp_gated else None
        self.up_proj = nn.Linear(d, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, d, bias=bias)
        self.plain, self.gated = activation.PLAIN[config.mlp_hidden_act], activation.GATED[config.mlp_hidden_act]

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """x (…, hidden) → the same shape."""
        if self.gate_proj is None:
            return self.down_proj(self.plain(self.up_proj(x)))
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))
