"""The MLP mixer."""

from torch import Tensor, nn

from bloomery.model import activation
from bloomery.model.config import ModelConfig
from bloomery.model.folded import AddedLinear, NormedLinear
from bloomery.model.norm import RMSNorm


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

    def step(self, norm: RMSNorm) -> "MLPStep":
        """x += self(norm(x)) without gradients, with the weights of now."""
        return MLPStep(self, norm)


class MLPStep:
    """x += mlp(norm(x)); gate and up in one product."""

    def __init__(self, mlp: MLP, norm: RMSNorm):
        gate = [] if mlp.gate_proj is None else [mlp.gate_proj]
        self._into = NormedLinear(norm, [*gate, mlp.up_proj])
        self._out = AddedLinear(mlp.down_proj)
        self._gated, self._plain = mlp.gated if gate else None, mlp.plain

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        """x (rows, hidden) → x."""
        inner = self._into(x)
        return self._out(x, self._plain(inner) if self._gated is None else self._gated(*inner.chunk(2, -1)))
