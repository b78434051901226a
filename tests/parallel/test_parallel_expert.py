"""A layer of experts shared by eight ranks against one process that has them all: output, every gradient, in float64.

Tokens lie as in a model: rows over data, zigzag halves over context, then contiguous over tensor.
"""

import itertools

import pytest
import torch
from distributed import run

from bloomery.model import balance
from bloomery.model.balance import BalanceConfig
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.expert import apply_experts
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.sequence import Layout

WORLD, ROWS, SEQ, HIDDEN, EXPERTS, CHOICES = 8, 2, 16, 6, 8, 2
DENSE = [(2, 2, 2), (1, 8, 1), (4, 1, 2), (1, 1, 8)]
SPARSE = [(1, 8, 1), (1, 4, 2), (2, 4, 1), (2, 2, 2), (4, 2, 1), (1, 1, 8), (8, 1, 1)]
TERMS = {"weight": 0.3, "z_weight": 0.02}


def case(dense, sparse, dispatcher="auto", crowded=False, kind="batch", capacity=None, activation="sigmoid"):
    return dense, sparse, dispatcher, crowded, kind, capacity or {}, activation


EVERY = [case(*pair) for pair in itertools.product(DENSE, SPARSE)]
EVERY += [
    case((2, 2, 2), sparse, dispatcher, crowded=crowded)
    for sparse, (dispatcher, crowded) in itertools.product(
        [(1, 4, 2), (2, 4, 1), (8, 1, 1)], [("all_gather", False), ("all_to_all", True), ("all_gather", True)]
    )
]
EVERY += [
    case((2, 2, 2), (2, 4, 1), kind="sequence"), case((2, 2, 2), (2, 4, 1), kind="global"),
    case((1, 2, 4), (1, 4, 2), activation="softmax"),
    case((2, 2, 2), (2, 4, 1), "all_to_all", capacity={"capacity_factor": 1.0}),
    case((2, 2, 2), (2, 4, 1), "all_to_all", capacity={"capacity_factor": 1.0, "pad": True}),
]  # fmt: skip
COVERING = [
    case((2, 2, 2), (1, 8, 1)), case((2, 2, 2), (2, 2, 2), "all_gather", crowded=True),
    case((2, 2, 2), (2, 4, 1), "all_to_all", kind="sequence"),
    case((2, 2, 2), (2, 4, 1), "all_to_all", crowded=True, kind="global", activation="softmax"),
    case((2, 2, 2), (4, 2, 1)), case((2, 2, 2), (1, 1, 8)),
    case((2, 2, 2), (2, 4, 1), "all_to_all", capacity={"capacity_factor": 1.0}),
    case((2, 2, 2), (2, 4, 1), "all_to_all", capacity={"capacity_factor": 1.0, "pad": True, "drop_policy": "position"}),
]  # fmt: skip


def model(crowded, kind, capacity, activation):
    """A decoder of one layer; `crowded`: all tokens go to the same experts."""
    torch.manual_seed(5)
    config = ModelConfig(
        pattern="E", vocab_size=8, hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=CHOICES,
        moe_intermediate_size=8, mlp_gated=True, mlp_hidden_act="silu", router_activation=activation,
        n_shared_experts=1, moe_shared_expert_intermediate_size=4, initializer_range=0.5,
    )  # fmt: skip
    decoder = Decoder(config).double().train()
    moe = decoder.layers[0].mixer
    if crowded:
        with torch.no_grad():
            moe.gate.weight.zero_()
            moe.gate.weight[:, 0] = torch.tensor([0.0, 0.1, 0.2, 3.0, 0.3, 4.0, 0.4, 0.5]).double()
    balance.install(decoder, BalanceConfig(kind=kind, **TERMS, **capacity))
    return decoder, moe


def inputs(data, crowded):
    """x, what the loss multiplies the output by, and which tokens have labels, of all data ranks."""
    draw = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(data * ROWS, SEQ, HIDDEN, generator=draw, dtype=torch.float64) for _ in range(2))
    if crowded:
        x[..., 0] = x[..., 0].abs() + 0.1
    return x, weights, torch.rand(data * ROWS, SEQ, generator=draw) < 0.7


def learn(moe, x, weights, labelled):
    balance.weigh(moe, labelled)
    out = moe(x)
    (out * weights).sum().backward()
    return out.detach(), balance.terms(moe)[0].detach()


def places(meshes, data):
    """Rows and tokens of this rank."""
    rows = torch.arange(ROWS) + ROWS * meshes.place("data")
    tokens = Layout(SEQ, meshes.size("context")).index(meshes.place("context"))
    return rows, tokens.chunk(meshes.size("tensor"))[meshes.place("tensor")]


def on_a_rank(cases):
    return [_one(*each) for each in cases]


def _one(dense, sparse, dispatcher, crowded, kind, capacity, activation):
    tensor, context, data = dense
    meshes = Meshes.create(
        Mapping.over(WORLD, tensor=tensor, context=context, data=data, expert_tensor=sparse[0], expert=sparse[1])
    )
    decoder, moe = model(crowded, kind, capacity, activation)
    placements = apply_experts(decoder, meshes, dispatcher)
    rows, tokens = places(meshes, data)
    x, weights, labelled = (each[rows][:, tokens] for each in inputs(data, crowded))
    x.requires_grad_()
    out, extra = learn(moe, x, weights, labelled)
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters() if "mixer" in name}
    assert all(gradient is not None for gradient in gradients.values())
    return rows, tokens, out, extra, x.grad, gradients, {name: place.piece for name, place in placements.items()}


def on_one_process(dense, sparse, dispatcher, crowded, kind, capacity, activation):
    """As `_one` of a single rank; with a capacity, each shard of tokens by itself, and no expert shared."""
    data, (decoder, moe) = dense[2], model(crowded, kind, capacity, activation)
    x, weights, labelled = inputs(data, crowded)
    x.requires_grad_()
    _check_gaps(moe, x)
    if kind == "global":
        _count_all(moe, x)
    parts = [learn(moe, *(each[rows] for each in (x, weights, labelled))) for rows in torch.arange(len(x)).split(ROWS)]
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters() if "mixer" in name}
    return torch.cat([part[0] for part in parts]), sum(part[1] for part in parts), x.grad, gradients


def _check_gaps(moe, x):
    """No choice of experts may hang on rounding."""
    ordered = moe.gate(x.flatten(0, 1)).scores.sort(-1, descending=True).values
    assert (ordered[:, CHOICES - 1] - ordered[:, CHOICES]).min() > 1e-6


def _count_all(moe, x):
    """The load of all data ranks, which each of them sees."""
    counts = torch.bincount(moe.gate(x.flatten(0, 1)).indices.flatten(), minlength=EXPERTS)
    moe.balancing._share = lambda own, shared: (counts / counts.sum().double())[None]


def assert_equal(found, wanted, what):
    scale = wanted.abs().max().item()
    assert scale > 0, what
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 * scale, msg=lambda text: f"{what}: {text}")


def compare(cases):
    answers = run(WORLD, on_a_rank, cases)
    for number, each in enumerate(cases):
        ranks = [answer[number] for answer in answers]
        expected = on_one_process(*each) if not each[5] else on_shards(*each)
        out, extra, x_gradient, gradients = expected
        assert_equal(assembled(ranks, 2, out), out, f"{each} output")
        assert_equal(assembled(ranks, 4, out), x_gradient, f"{each} gradient of the input")
        assert_equal(sum(rank[3] for rank in ranks), extra, f"{each} balancing terms")
        for name, wanted in gradients.items():
            total = torch.zeros_like(wanted)
            for rank in ranks:
                part = torch.zeros_like(wanted)
                rank[6][name].put(rank[5][name], part) if name in rank[6] else part.add_(rank[5][name])
                total += part
            assert_equal(total, wanted, f"{each} {name}")


def assembled(ranks, place, like):
    whole = torch.full_like(like, torch.nan)
    for rank in ranks:
        whole[rank[0][:, None], rank[1]] = rank[place]
    return whole


def on_shards(dense, sparse, dispatcher, crowded, kind, capacity, activation):
    """One process without any of our dispatchers: copies over the capacity are left out token by token."""
    tensor, context, data = dense
    decoder, moe = model(crowded, kind, capacity, activation)
    x, weights, labelled = inputs(data, crowded)
    x.requires_grad_()
    out, extra = torch.zeros_like(x), 0.0
    for row in range(0, len(x), ROWS):
        balance.weigh(moe, labelled[row : row + ROWS])
        part, drop = x[row : row + ROWS], shards(SEQ, context, tensor)
        moe.dispatch = Loop(drop, capacity)
        result = moe(part)
        (result * weights[row : row + ROWS]).sum().backward()
        out[row : row + ROWS], extra = result.detach(), extra + balance.terms(moe)[0].detach()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters() if "mixer" in name}
    return out.detach(), extra, x.grad, gradients


def shards(seq, context, tensor):
    """The tokens of a sequence by rank."""
    return [part for rank in range(context) for part in Layout(seq, context).index(rank).chunk(tensor)]


class Loop(torch.nn.Module):
    """Experts one after another, with a capacity for each set of tokens (`shards`) by itself."""

    def __init__(self, shards, capacity):
        super().__init__()
        self.shards, self.capacity = shards, capacity

    def forward(self, x, indices, weights, experts):
        batch, seq, width = x.shape
        indices, weights = (each.view(batch, seq, -1) for each in (indices, weights))
        out = torch.zeros_like(x)
        for shard in self.shards:
            tokens, chosen, weight = (each[:, shard].flatten(0, 1) for each in (x, indices, weights))
            out[:, shard] = self._shard(tokens, chosen, weight, experts).view(batch, len(shard), width)
        return out

    def _shard(self, x, indices, weights, experts):
        limit = -(-len(x) * CHOICES * self.capacity["capacity_factor"] // EXPERTS)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            tokens, places = (indices == expert).nonzero(as_tuple=True)
            if self.capacity.get("drop_policy", "probs") == "probs":
                order = weights[tokens, places].argsort(descending=True, stable=True)
                tokens, places = tokens[order], places[order]
            tokens, places = tokens[: int(limit)], places[: int(limit)]
            gate, up, down = (p[expert] for p in (experts.gate_proj, experts.up_proj, experts.down_proj))
            rows = (torch.nn.functional.silu(x[tokens] @ gate.T) * (x[tokens] @ up.T)) @ down.T
            out = out.index_add(0, tokens, rows * weights[tokens, places, None])
        return out


def test_a_covering_part_of_the_matrix_equals_one_process():
    compare(COVERING)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(7))
def test_the_whole_matrix_equals_one_process(part):
    assert len(EVERY) == 42
    compare(EVERY[part::7])
