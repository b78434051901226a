"""Dispatchers: what they send, what they drop, and what they do with input that nobody wants. Eight ranks, float64."""

import numpy as np
import pytest
import torch
from distributed import run
from torch.utils.checkpoint import checkpoint

from bloomery.config import build
from bloomery.errors import BloomeryError, ConfigError, DivergenceError
from bloomery.model import balance
from bloomery.model.balance import BalanceConfig
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.capacity import Capacity, Sequence, kept
from bloomery.parallel.collectives import traffic
from bloomery.parallel.expert import apply_experts, sends_fewer
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.permute import Order, chunk_order, combine, spread
from bloomery.parallel.room import Room
from bloomery.parallel.sequence import Layout

WORLD, ROWS, SEQ, HIDDEN, EXPERTS, CHOICES, BYTES = 8, 2, 16, 6, 8, 2, 8


def model(**balancing):
    torch.manual_seed(5)
    config = ModelConfig(
        pattern="*E", vocab_size=8, hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=CHOICES,
        moe_intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=2, initializer_range=0.5,
    )  # fmt: skip
    decoder = Decoder(config).double().train()
    balance.install(decoder, BalanceConfig(**balancing))
    return decoder


def tokens(rows=ROWS):
    return torch.randn(rows, SEQ, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def spread_over_ranks(degrees, dispatcher="auto", **balancing):
    meshes = Meshes.create(Mapping.over(WORLD, **degrees))
    decoder = model(**balancing)
    apply_experts(decoder, meshes, dispatcher)
    return meshes, decoder.layers[1].mixer


def own(meshes):
    places = Layout(SEQ, meshes.size("context")).index(meshes.place("context"))
    return places.chunk(meshes.size("tensor"))[meshes.place("tensor")]


# What is dropped


def dropped_output(cases):
    found = []
    for degrees, balancing in cases:
        meshes, moe = spread_over_ranks(degrees, **balancing)
        rows = torch.arange(ROWS) + ROWS * meshes.place("data")
        x = tokens(ROWS * meshes.size("data"))[rows][:, own(meshes)]
        found.append((rows, own(meshes), moe(x).detach(), moe.dispatch.metrics["dropped"]))
    return found


def test_full_sequence_dropping_is_equal_under_all_mappings_and_sub_sequence_is_not():
    mappings = [
        {"tensor": 2, "context": 2, "data": 2, "expert": 4}, {"context": 4, "data": 2, "expert": 2, "expert_tensor": 2},
        {"tensor": 4, "data": 2, "expert": 8},
    ]  # fmt: skip
    settings = [
        {"capacity_factor": 1.0, "drop": "full_sequence"},
        {"capacity_factor": 1.0, "drop": "full_sequence", "drop_policy": "position", "pad": True},
        {"capacity_factor": 1.0},
    ]
    cases = [(mapping, setting) for setting in settings for mapping in mappings]
    answers = run(WORLD, dropped_output, cases)
    whole = []
    for number in range(len(cases)):
        out = torch.full((2 * ROWS, SEQ, HIDDEN), torch.nan, dtype=torch.float64)
        for rank in answers:
            rows, places, part, _ = rank[number]
            out[rows[:, None], places] = part
        whole.append(out)
    alone = [dropped_alone(setting) for setting in settings[:2]]
    for setting in (0, 1):
        for mapping in range(3):
            torch.testing.assert_close(whole[3 * setting + mapping], alone[setting], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(whole[6], whole[7])
    assert not torch.allclose(whole[0], whole[3])
    shares = [float(rank[number][3][0]) / float(rank[number][3][1]) for rank in answers for number in (0, 6)]
    assert all(0 < share < 0.5 for share in shares)


def dropped_alone(setting):
    decoder = model(**setting)
    apply_experts(decoder, Meshes.create(Mapping()))
    return torch.cat([decoder.layers[1].mixer(part).detach() for part in tokens(2 * ROWS).split(ROWS)])


ALONE = Sequence(None, 1, lambda seq: torch.arange(seq))


def test_an_expert_keeps_the_greatest_weights_or_the_earliest_and_of_equal_ones_the_earlier():
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.6, 0.4]])
    indices = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]])
    for drop in ("sub_sequence", "full_sequence"):  # of one rank: the same
        by_weight = kept(weights, indices, 4, Capacity(1.0, drop), ALONE, rows=1)
        assert by_weight.tolist() == [[False, True], [True, True], [False, True], [True, True]]
        roomy = kept(weights, indices, 4, Capacity(1.5, drop), ALONE, rows=1)
        assert roomy.tolist() == [[True, True], [True, True], [False, True], [True, True]]
        by_position = kept(weights, indices, 4, Capacity(1.0, drop, "position"), ALONE, rows=1)
        assert by_position.tolist() == [[True, True], [True, True], [False, True], [False, True]]


def test_a_capacity_limits_a_single_process_too():
    decoder = model(capacity_factor=0.5)
    x, mixer = tokens(), decoder.layers[1].mixer
    whole = mixer(x)
    apply_experts(decoder, Meshes.create(Mapping()))
    limited = mixer(x)
    part, copies = mixer.dispatch.metrics["dropped"]
    assert copies == ROWS * SEQ * CHOICES
    assert part >= copies / 2
    assert not torch.allclose(whole, limited)
    balance.weigh(decoder, torch.ones(ROWS, SEQ, dtype=torch.bool))
    mixer(x)
    assert balance.terms(decoder)[1]["dropped"] == (part, copies)


# What is sent


def bytes_sent(cases):
    found = []
    for degrees, dispatcher in cases:
        meshes, moe = spread_over_ranks(degrees, dispatcher)
        x = tokens(ROWS)[:, own(meshes)].requires_grad_()
        with traffic() as forward:
            out = moe.dispatch(x, *moe.gate(x.flatten(0, 1))[:2], moe.experts)
        with traffic() as both:
            out.square().sum().backward()
        found.append((moe.gate(x.flatten(0, 1)).indices, dict(forward), dict(both)))
    return found


def test_every_byte_is_accounted_for():
    degrees = {"tensor": 2, "context": 4, "data": 1, "expert": 4, "expert_tensor": 2}
    answers = run(WORLD, bytes_sent, [(degrees, "all_to_all"), (degrees, "all_gather")])
    ranks, held, row = (4, 2), EXPERTS // 4, HIDDEN * BYTES
    table = np.stack([torch.bincount(rank[0][0].flatten(), minlength=EXPERTS).numpy() for rank in answers])
    table = table.reshape(*ranks, EXPERTS)
    counts = {("expert_expert_tensor", "gather"): (WORLD - 1) * (EXPERTS + 3) * BYTES}  # dropped, finite, room
    for number, rank in enumerate(answers):
        place, half = divmod(number, 2)
        mine = slice(place * held, (place + 1) * held)
        away = table[place, half].sum() - table[place, half, mine].sum()
        back = table[:, half, mine].sum() - table[place, half, mine].sum()
        rows = table[:, :, mine].sum((0, 2))
        forward = counts | {
            ("expert", "all_to_all"): (away + back) * row,
            ("expert_tensor", "gather"): rows[half] * row,
            ("expert_tensor", "reduce_scatter"): rows[1 - half] * row,
        }
        assert rank[0][1] == forward
        assert sum(rank[0][2].values()) == sum(forward.values()) - sum(counts.values())  # as much, without the counts
    size, group = ROWS * SEQ // WORLD, WORLD - 1
    for rank in answers:
        copies = size * CHOICES * BYTES  # weights, and once more indices
        assert rank[1][1] == {
            ("expert_expert_tensor", "gather"): group * (size * row + 2 * copies + 3 * BYTES),
            ("expert_expert_tensor", "reduce_scatter"): group * size * row,
        }
        assert sum(rank[1][2].values()) == group * (2 * size * row + copies)


def test_the_dispatcher_is_the_one_that_sends_fewer_rows():
    assert sends_fewer(choices=8, expert=8, expert_tensor=1) == "all_to_all"
    assert sends_fewer(choices=8, expert=4, expert_tensor=1) == "all_gather"
    assert sends_fewer(choices=2, expert=4, expert_tensor=1) == "all_to_all"
    assert sends_fewer(choices=1, expert=1, expert_tensor=4) == "all_to_all"
    assert sends_fewer(choices=2, expert=1, expert_tensor=4) == "all_gather"


# What nobody wants


def ranks_without_tokens(dispatchers):
    """Rank 3 has no tokens, and rank 5 not even a sequence."""
    found = []
    for dispatcher in dispatchers:
        meshes, moe = spread_over_ranks({"data": 8, "expert": 4, "expert_tensor": 2}, dispatcher)
        x = tokens(WORLD)[meshes.rank : meshes.rank + 1]
        x = {3: x[:, :0], 5: x[:0]}.get(meshes.rank, x).clone().requires_grad_()
        balance.weigh(moe, torch.ones(x.shape[:2], dtype=torch.bool))
        moe(x).square().sum().backward()
        found.append((x.grad, {name: parameter.grad for name, parameter in moe.named_parameters()}))
    return found


def test_a_rank_without_tokens_takes_part():
    answers = run(WORLD, ranks_without_tokens, ["all_to_all", "all_gather"])
    x, moe = tokens(WORLD).requires_grad_(), model().layers[1].mixer
    for rank in set(range(WORLD)) - {3, 5}:
        balance.weigh(moe, torch.ones(1, SEQ, dtype=torch.bool))
        moe(x[rank : rank + 1]).square().sum().backward()
    for number in (0, 1):
        ranks = [answer[number] for answer in answers]
        torch.testing.assert_close(
            torch.cat([rank[0] for rank in ranks if rank[0].numel()]), x.grad[[0, 1, 2, 4, 6, 7]]
        )
        assert not ranks[3][1]["gate.weight"].any()
        torch.testing.assert_close(sum(rank[1]["gate.weight"] for rank in ranks), moe.gate.weight.grad)
        up = torch.stack([rank[1]["experts.up_proj"] for rank in ranks]).unflatten(0, (4, 2))
        torch.testing.assert_close(up.transpose(1, 2).reshape(moe.experts.up_proj.shape), moe.experts.up_proj.grad)


def refused(what):
    """What each rank is told when something is wrong on one of them."""
    room = Room._free
    try:
        meshes, moe = spread_over_ranks({"data": 8, "expert": 8})
        x = tokens(WORLD)[meshes.rank : meshes.rank + 1]
        if what == "not finite" and meshes.rank == 6:
            x[0, 3, 2] = torch.nan
        if what == "no room" and meshes.rank == 2:
            Room._free = lambda self: torch.tensor(100)
        moe(x)
    except BloomeryError as error:
        return type(error), str(error)
    finally:
        Room._free = room
    return None


def test_weights_that_are_not_finite_stop_all_ranks_before_anything_is_sent():
    for kind, message in run(WORLD, refused, "not finite"):
        assert kind is DivergenceError
        assert "router weights of rank 6 of 8 that share the experts are not finite; no token was sent" in message


def test_rows_that_do_not_fit_stop_all_ranks_before_they_are_allocated():
    for kind, message in run(WORLD, refused, "no room"):
        assert kind is BloomeryError
        assert message.startswith("experts: rank 2 of 8 that share the experts would get ")
        assert "times the mean, for 1 experts: 0.00 GiB, but 0.00 GiB are free; set capacity_factor" in message


def test_enough_room_is_asked_for_again_only_when_there_are_many_more_rows():
    room, asked = Room(model().layers[1].mixer.experts, None), []
    room._free = lambda: asked.append(1) or torch.tensor(10**9)
    for rows in (100, 120, 90, 126, 150, 158):
        room(np.array([rows]), 8)
    assert len(asked) == 3


def recomputed(dispatchers):
    found = []
    for dispatcher in dispatchers:
        for recompute in (False, True):
            degrees = {"tensor": 2, "context": 2, "data": 2, "expert": 4, "expert_tensor": 2}
            meshes, moe = spread_over_ranks(degrees, dispatcher, bias_rate=0.1, z_weight=0.01)
            x = tokens(ROWS)[:, own(meshes)].requires_grad_()
            balance.weigh(moe, torch.ones(ROWS, x.shape[1], dtype=torch.bool))
            out = checkpoint(moe, x, use_reentrant=False) if recompute else moe(x)
            out.square().sum().backward()
            load = moe.balancing.load.clone()
            balance.after_step(moe)
            bias = moe.gate.e_score_correction_bias
            found.append(([x.grad, *(parameter.grad for parameter in moe.parameters())], load, bias))
    return found


def test_recomputed_activations_go_the_same_way_and_count_once():
    answers = run(WORLD, recomputed, ["all_to_all", "all_gather"])
    for answer in answers:
        for plain, again in (answer[:2], answer[2:]):
            for ours, true in zip(again[0], plain[0], strict=True):
                torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-15)
            assert torch.equal(again[1], plain[1])
            assert torch.equal(again[2], answers[0][0][2])  # the same bias on all ranks
    # Both data ranks had the same tokens: the stage's load is twice that of one.
    total = sum(answer[0][1] for answer in answers)
    indices = model().layers[1].mixer.gate(tokens().flatten(0, 1)).indices
    assert torch.equal(total, 2 * torch.bincount(indices.flatten(), minlength=EXPERTS))
    expected = 0.1 * (total.double().mean() - total).sign()
    torch.testing.assert_close(answers[0][0][2], expected.to(answers[0][0][2].dtype))


def test_settings_without_effect_are_refused():
    with pytest.raises(ConfigError, match="drop, drop_policy and pad have no effect without capacity_factor"):
        build(BalanceConfig, {"pad": True}, "loop.balance")
    with pytest.raises(ConfigError, match=r"balance.pad: only the dispatcher all_to_all pads"):
        apply_experts(model(capacity_factor=1.0, pad=True), Meshes.create(Mapping()), "all_gather")


# Orders of rows


def test_copies_are_sorted_by_expert_and_find_their_way_back():
    experts = torch.tensor([[2, 0], [1, 3], [0, 2]])  # 3: an expert that nobody has
    order = Order.by_expert(experts, count=5)
    assert order.copies.tolist() == [1, 4, 2, 0, 5]
    assert order.rows.tolist() == [[3, 0], [2, 5], [1, 4]]
    slots = Order.in_slots(experts, count=3, slots=2)
    assert slots.copies.tolist() == [1, 4, 2, 6, 0, 5]
    assert slots.rows.tolist() == [[4, 0], [2, 6], [1, 5]]
    x = torch.tensor([[1.0], [2.0], [3.0]])
    assert spread(x, slots).flatten().tolist() == [1, 3, 2, 0, 1, 3]
    assert combine(spread(x, order), order, torch.ones(3, 2)).flatten().tolist() == [2, 2, 6]


def test_gradients_of_rows_and_weights():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    experts = torch.randint(4, (5, 2))
    for order in (Order.by_expert(experts, None), Order.in_slots(experts, 3, 5)):
        assert torch.autograd.gradcheck(lambda x, order=order: spread(x, order), x)
        rows = torch.randn(len(order.copies), 3, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda rows, weights, order=order: combine(rows * (order.copies < 10)[:, None], order, weights),
            (rows, weights),
        )


def test_chunks_are_turned_and_turned_back():
    sizes = np.array([[2, 1], [0, 3], [1, 0]])
    there, back = chunk_order(sizes, torch.device("cpu"))
    assert there.tolist() == [0, 1, 6, 2, 3, 4, 5]
    assert there[back].tolist() == list(range(7))
