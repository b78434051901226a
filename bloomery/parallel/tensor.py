"""Tensor parallelism with sequence parallelism (arXiv 1909.08053, 2205.05198), applied to a decoder from outside.

Every rank along `tensor` holds other tokens. A mixer whose weights are shared gathers them on its way in, works with
its heads or channels, and on its way out the ranks' outputs are summed and each keeps its own tokens. Norms, embedding,
router and head see a rank's own tokens with whole weights, so their gradients are partial sums over `tensor` too.

What is more than a product (`BiasLater`, `SharedHeads`) is no `nn.Linear`, so that FP8 leaves it alone.

Mamba-2 is shared by whole groups (arXiv 2504.03624): heads, B and C, convolution channels and the gated norm of a group
stay together, so nothing else has to be sent. Key heads fewer than ranks are held by several ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.attention import Attention
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder, Layer
from bloomery.model.layers import MLP
from bloomery.model.mamba import Mamba
from bloomery.parallel.collectives import Group, gather_tokens, scatter_tokens, sum_gradient
from bloomery.parallel.mesh import Meshes, group_of
from bloomery.parallel.pieces import Piece, Placement

REPLICATED = ("data", "context", "tensor")
SHARED = ("data", "context")


@dataclass(frozen=True)
class Cut:
    """How a parameter is shared: along `dim`, each of `sections` (one for all of it) for itself; among `count` ranks or
    sets of ranks, where that is fewer than there are."""

    dim: int
    sections: tuple[int, ...] = ()
    count: int = 0


def apply_tensor(model: Decoder, meshes: Meshes) -> dict[str, Placement]:
    """Shares the weights of the `*`, `-` and `M` layers in place.

    Returns where every parameter of the model belongs, with its name; experts as if nothing shared them.
    """
    placements = {
        name: Placement(Piece.whole(parameter.shape), REPLICATED) for name, parameter in model.named_parameters()
    }
    if meshes.size("tensor") == 1:
        return placements
    for number, layer in enumerate(model.layers.children()):
        assert isinstance(layer, Layer)
        share = _SHARES.get(layer.kind)
        if share is not None:
            found = share(layer.mixer, model.config, meshes)
            placements |= {f"layers.{number}.mixer.{name}": placement for name, placement in found.items()}
    return placements


def _attention(mixer: Attention, config: ModelConfig, meshes: Meshes) -> dict[str, Placement]:
    holders = min(config.num_key_value_heads, meshes.size("tensor"))
    cuts = {"q_proj": Cut(0), "k_proj": Cut(0, count=holders), "v_proj": Cut(0, count=holders)}
    found = _share(mixer, _with_biases(mixer, cuts) | {"o_proj.weight": Cut(1)}, meshes)
    _exchange_tokens(mixer, "o_proj", meshes.group("tensor"))
    same = meshes.size("tensor") // holders
    if same > 1:
        place = meshes.place("tensor") % same
        ranks = meshes.ranks("tensor")[meshes.place("tensor") - place :][:same]
        group = group_of(ranks, "key_heads")
        for name in ("k_proj", "v_proj"):
            setattr(mixer, name, SharedHeads(getattr(mixer, name), group))
    return found


def _mlp(mixer: MLP, config: ModelConfig, meshes: Meshes) -> dict[str, Placement]:
    cuts = {"up_proj": Cut(0)} | ({"gate_proj": Cut(0)} if mixer.gate_proj is not None else {})
    found = _share(mixer, _with_biases(mixer, cuts) | {"down_proj.weight": Cut(1)}, meshes)
    _exchange_tokens(mixer, "down_proj", meshes.group("tensor"))
    return found


def _mamba(mixer: Mamba, config: ModelConfig, meshes: Meshes) -> dict[str, Placement]:
    inner, heads, state = config.mamba_inner_size, config.mamba_num_heads, config.n_groups * config.ssm_state_size
    of_heads = dict.fromkeys(("A_log", "D", "dt_bias", "norm.weight"), Cut(0))
    channels = _with_biases(mixer, {"conv1d": Cut(0, (inner, state, state))})
    rows = {"in_proj.weight": Cut(0, (inner, inner, state, state, heads)), "out_proj.weight": Cut(1)}
    found = _share(mixer, rows | channels | of_heads, meshes)
    ranks = meshes.size("tensor")
    mixer.config = config.model_copy(update={"mamba_num_heads": heads // ranks, "n_groups": config.n_groups // ranks})
    mixer.norm.groups = mixer.config.n_groups
    mixer.conv1d.in_channels = mixer.conv1d.out_channels = mixer.conv1d.groups = mixer.config.mamba_conv_size
    _exchange_tokens(mixer, "out_proj", meshes.group("tensor"))
    return found


_SHARES: dict[str, Callable[[Any, ModelConfig, Meshes], dict[str, Placement]]] = {
    "*": _attention,
    "-": _mlp,
    "M": _mamba,
}


def _with_biases(mixer: nn.Module, cuts: dict[str, Cut]) -> dict[str, Cut]:
    """The same cut for the bias of each of these projections that has one."""
    biased = {name: cut for name, cut in cuts.items() if mixer.get_submodule(name).bias is not None}
    return {f"{name}.weight": cut for name, cut in cuts.items()} | {f"{n}.bias": cut for n, cut in biased.items()}


def _share(mixer: nn.Module, cuts: dict[str, Cut], meshes: Meshes) -> dict[str, Placement]:
    """Replaces each parameter by this rank's part of it."""
    ranks, place = meshes.size("tensor"), meshes.place("tensor")
    found = {}
    for name, cut in cuts.items():
        parameter = mixer.get_parameter(name)
        count = cut.count or ranks
        whole = Piece.whole(parameter.shape)
        sections = cut.sections or (parameter.shape[cut.dim],)
        piece = whole.shard_sections(cut.dim, sections, place * count // ranks, count)
        owner, _, leaf = name.rpartition(".")
        module = mixer.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(piece.take(parameter.detach()), parameter.requires_grad))
        if isinstance(module, nn.Linear) and leaf == "weight":
            module.out_features, module.in_features = piece.local
        found[name] = Placement(piece, SHARED, copies=ranks // count)
    return found


def _exchange_tokens(mixer: nn.Module, output: str, group: Group) -> None:
    """Gathers what goes into the mixer and scatters what its `output` layer makes; a bias of that is added then."""
    linear = mixer.get_submodule(output)
    assert isinstance(linear, nn.Linear)
    if linear.bias is not None:
        setattr(mixer, output, BiasLater(linear))

    def before(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return gather_tokens(_as_multiplied(given[0]), 1, group), *given[1:]

    def after(_: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        own, bias = scatter_tokens(out, 1, group), mixer.get_submodule(output).bias
        return own if bias is None else own + bias.to(own.dtype)  # type: ignore[operator]

    mixer.register_forward_pre_hook(before)
    mixer.register_forward_hook(after)


class BiasLater(nn.Module):
    """A linear layer that leaves its bias to its caller: the sum of the ranks' outputs needs it once."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class SharedHeads(nn.Module):
    """A linear layer that several ranks hold: each has the gradient of its own queries, and all need the sum."""

    def __init__(self, linear: nn.Linear, group: Group):
        super().__init__()
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else sum_gradient(self.bias, self.group)
        return F.linear(x, sum_gradient(self.weight, self.group), bias)


def _as_multiplied(x: Tensor) -> Tensor:
    """In the type that the products on the other side cast to anyway: half the bytes under bf16 autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
