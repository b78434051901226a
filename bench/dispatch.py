"""Tokens to experts and back on a CPU, forward and backward, with the same experts on both sides.

64 experts of which a token visits 8, hidden size 256, inner width 128, 2048 tokens; float32, one thread.
`dispatch/cpu`: the dispatcher that ranks use, here alone, against a plain loop over the experts, each with the tokens
that chose it. `dispatch/torchtitan`: against the token dispatcher of torchtitan 0.3.0 around the same grouped products,
where it can be imported: `pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring_parser triton`.
Its experts compute in bfloat16 only, so ours serve both.
`python -m bench.dispatch [--quick]` prints one JSON line per figure: tokens per second; ratio > 1: ours is faster.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.figure import take_turns
from bloomery.model.balance import BalanceConfig
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.model.moe import Experts, MoE
from bloomery.parallel.capacity import Sequence
from bloomery.parallel.dispatch import AllToAll, Grid
from bloomery.parallel.room import Room

TOKENS = 2048
MODEL = ModelConfig(
    pattern="*E", vocab_size=64, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    n_routed_experts=64, num_experts_per_tok=8, moe_intermediate_size=128, mlp_gated=True, mlp_hidden_act="silu",
    initializer_range=0.1,
)  # fmt: skip
Way = Callable[[Tensor, Tensor, Tensor, Experts], Tensor]


def loop(x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Expert by expert, as one writes it first."""
    assert experts.gate_proj is not None
    tokens, out = x.flatten(0, -2), torch.zeros_like(x.flatten(0, -2))
    for number, (gate, up, down) in enumerate(zip(experts.gate_proj, experts.up_proj, experts.down_proj, strict=True)):
        rows, choices = (indices == number).nonzero(as_tuple=True)
        if len(rows):
            part = tokens[rows]
            inner = F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up), down)
            out = out.index_add(0, rows, inner * weights[rows, choices, None])
    return out.view_as(x)


def ours(experts: Experts) -> Way:
    """The dispatcher of a rank that has all experts."""
    grid = Grid(MODEL.n_routed_experts, (1, 1), (0, 0), None, None, None)
    return AllToAll(grid, Sequence(None, 1, torch.arange), None, Room(experts, None))


def torchtitan() -> Way:
    """Its dispatcher for experts that are all on one rank."""
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    theirs = LocalTokenDispatcher(
        LocalTokenDispatcher.Config(num_experts=MODEL.n_routed_experts, top_k=MODEL.num_experts_per_tok)
    )

    def run(x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        tokens = x.flatten(0, -2)
        counts = torch.bincount(indices.flatten(), minlength=MODEL.n_routed_experts)
        rows, counts, metadata = theirs.dispatch(tokens, weights, indices, counts)
        return theirs.combine(experts(rows, counts), metadata, tokens).view_as(x)

    return run


def measure(repeats: int) -> list[dict[str, object]]:
    """All figures that this environment can make, after a check that both sides give the same."""
    torch.manual_seed(0)
    moe = Decoder(MODEL).layers[1].mixer
    assert isinstance(moe, MoE)
    moe.balancing.config = BalanceConfig(weight=0.0)
    x = torch.randn(2, TOKENS // 2, MODEL.hidden_size, requires_grad=True)
    indices, weights, *_ = moe.gate(x.detach().flatten(0, 1))
    weights = weights.detach().requires_grad_()

    def step(way: Way) -> Tensor:
        out = way(x, indices, weights, moe.experts)
        out.backward(torch.ones_like(out))
        return out.detach()

    peers = {"dispatch/cpu": loop}
    if find_spec("torchtitan") is not None:
        peers["dispatch/torchtitan"] = torchtitan()
    else:
        print("dispatch/torchtitan: torchtitan is not installed; see the top of bench/dispatch.py", file=sys.stderr)
    mine, found = ours(moe.experts), []
    for name, peer in peers.items():
        torch.testing.assert_close(step(mine), step(peer), rtol=1e-3, atol=1e-4)
        found.append(take_turns(name, lambda: step(mine), lambda peer=peer: step(peer), TOKENS, "tokens/s", repeats))
        if peer is not loop:
            found[-1]["versions"] |= {"torchtitan": version("torchtitan")}  # type: ignore[operator]
    return found


def main() -> None:
    torch.set_num_threads(1)
    for each in measure(repeats=5 if "--quick" in sys.argv else 21):
        print(json.dumps(each), flush=True)


if __name__ == "__main__":
    main()
