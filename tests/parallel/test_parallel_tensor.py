"""Weights shared over tensor, tokens over context and tensor: by hand, counted in bytes, and what is refused."""

import equality
import pytest
import torch
from distributed import run
from exact_training import in_float64, next_token_exact

from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.apply import parallelize
from bloomery.parallel.collectives import traffic
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.tokens import join, split

SHARED = ModelConfig(
    pattern="*-M", vocab_size=16, hidden_size=8, num_attention_heads=4, num_key_value_heads=1, head_dim=2,
    attention_bias=True, intermediate_size=6, mlp_bias=True, mlp_gated=True,
    mamba_num_heads=4, mamba_head_dim=2, ssm_state_size=3, n_groups=2, initializer_range=0.2,
)  # fmt: skip
BATCH, SEQ = 3, 8


def decoder():
    torch.manual_seed(0)
    return Decoder(SHARED)


def parts():
    """What this rank holds of each parameter, and the boxes of in_proj."""
    parallel = parallelize(decoder(), Mapping(tensor=2))
    pieces = {name: placement.piece for name, placement in parallel.placements.items()}
    state = dict(parallel.full_state())
    whole = dict(decoder().named_parameters())
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], value) for name, value in whole.items())
    return {name: piece.local for name, piece in pieces.items()}, pieces["layers.2.mixer.in_proj.weight"].boxes


def test_a_rank_holds_its_heads_widths_and_groups():
    (shapes, boxes), (_, other) = run(2, parts)
    mixer = {name.removeprefix("layers."): shape for name, shape in shapes.items() if "mixer" in name}
    assert mixer["0.mixer.q_proj.weight"] == (4, 8)
    assert mixer["0.mixer.k_proj.weight"] == (2, 8)  # the only key head: both ranks hold it
    assert mixer["0.mixer.o_proj.weight"] == (8, 4)
    assert mixer["0.mixer.o_proj.bias"] == (8,)
    assert mixer["1.mixer.gate_proj.bias"] == (3,)
    assert mixer["1.mixer.down_proj.weight"] == (8, 3)
    assert mixer["2.mixer.conv1d.weight"] == (4 + 3 + 3, 1, 4)
    assert mixer["2.mixer.A_log"] == (2,)
    assert shapes["embeddings.weight"] == (8, 8)  # replicated over tensor, so sharded like over data
    # z, x, B, C and dt have 8, 8, 6, 6 and 4 rows, of which the first rank has the first half of each
    assert [inside.offset[0] for inside, _ in boxes] == [0, 8, 16, 22, 28]
    assert [inside.offset[0] for inside, _ in other] == [4, 12, 19, 25, 30]
    assert [inside.shape[0] for inside, _ in boxes] == [4, 4, 3, 3, 2]


def sent():
    """Bytes of a forward and backward pass by (group, operation)."""
    parallel = parallelize(decoder(), Mapping(tensor=2))
    ids = torch.arange(BATCH * SEQ).view(BATCH, SEQ) % 16
    batch = parallel.split({"input_ids": ids, "labels": ids})
    with traffic() as counter:
        loss = next_token_exact(parallel.model, batch)
        loss.sum.backward()
    return dict(counter)


def test_bytes_are_those_of_the_formula():
    """2·(T − 1)/T·b·s·h a layer each way, and position ids once; the key head's gradients are summed."""
    half = BATCH * SEQ * 8 * 4 // 2  # bytes of float32 that one rank sends in a gather or a reduce-scatter
    keys = (2 * 8 + 2) * 4  # weight and bias of the key head, and as much of the value head
    found = run(2, sent)[0]
    assert found == {
        ("tensor", "gather"): 3 * 2 * half + BATCH * SEQ * 8 // 2,
        ("tensor", "reduce_scatter"): 3 * 2 * half,
        ("key_heads", "all_reduce"): 2 * keys,
    }


def parts_of_a_batch():
    meshes = Meshes.create(Mapping(context=2, tensor=2))
    places = torch.arange(8).expand(2, 8)
    plain = {"input_ids": places, "labels": places, "advantages": torch.ones(2), "values": torch.rand(2, 8, 3)}
    own = split(plain, meshes)
    uneven = {"input_ids": torch.arange(5)[None], "labels": torch.arange(5)[None],
              "segment_ids": torch.tensor([[0, 0, 0, 1, 1]])}  # fmt: skip
    return own, split(uneven, meshes), torch.equal(own["values"], plain["values"][:, own["input_ids"][0]])


def test_tokens_are_cut_over_context_and_then_over_tensor():
    ranks = run(4, parts_of_a_batch)
    held = [own["input_ids"][0].tolist() for own, *_ in ranks]
    assert held == [[0, 1], [6, 7], [2, 3], [4, 5]]  # zigzag: runs 0 and 3 of four, then runs 1 and 2
    assert [own["position_ids"][1].tolist() for own, *_ in ranks] == held
    assert ranks[0][0]["advantages"].shape == (2,)
    one = Meshes(Mapping(context=2, tensor=2), 0, {})
    assert join([own["input_ids"] for own, *_ in ranks], one).tolist() == [list(range(8))] * 2


def test_uneven_sequences_are_padded_and_the_padding_is_marked():
    padded = [own for _, own, _ in run(4, parts_of_a_batch)]
    places = [0, 1, 6, 7, 2, 3, 4, 5]
    gathered = {name: torch.cat([own[name][0] for own in padded]).tolist() for name in padded[0]}
    assert gathered["labels"] == [0, 1, -100, -100, 2, 3, 4, -100]
    assert gathered["segment_ids"] == [0, 0, 2, 2, 0, 1, 1, 2]
    assert gathered["counted"] == [place < 5 for place in places]


def uneven():
    """Loss and gradients of sequences of five tokens, padded to eight; most ranks have no label."""
    with in_float64():
        parallel = parallelize(equality.decoder("biased"), Mapping(context=2, tensor=2, expert=4))
        batch = five_tokens()
        losses = parallel.forward_backward([parallel.split(batch)], next_token_exact)
        total = parallel.sum(torch.tensor([float(losses[0].sum), float(losses[0].weight)], dtype=torch.float64))
        gradients = {name: full.clone() for name, full in parallel.full_gradients()}
    return total.tolist(), gradients


def five_tokens():
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(equality.VOCABULARY, (2, 5), generator=draw)
    labels = torch.full((2, 5), -100)
    labels[0, :2] = ids[0, 1:3]
    return {"input_ids": ids, "labels": labels}


def test_padding_and_ranks_without_labels_change_nothing():
    with in_float64():
        model = equality.decoder("biased").train()
        loss = next_token_exact(model, five_tokens())
        loss.sum.backward()
    (total, weight), gradients = run(4, uneven)[0]
    assert weight == 2
    assert total == pytest.approx(float(loss.sum.detach()), rel=1e-9)
    for name, parameter in model.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9 * largest, msg=name)


def refused(which):
    """The message on this rank."""
    rank = torch.distributed.get_rank()
    config = SHARED.model_copy(update={"norm_eps": 1e-5 * (1 + (rank == 1 and which == "configs"))})
    try:
        model = parallelize(Decoder(config), Mapping(tensor=2)).model
        ids = torch.zeros(1, 4, dtype=torch.int64)
        model(ids, lengths=torch.tensor([3])) if which == "lengths" else model(ids)
    except (ConfigError, ValueError) as error:
        return str(error)
    return ""


def linear_layers():
    model = parallelize(decoder(), Mapping(tensor=2)).model
    found = {name for name, module in model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(name.rpartition(".")[2] for name in found)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("configs", "model.norm_eps: 2e-05 on rank 1, but 1e-05 on rank 0; start all ranks with the same recipe"),
        ("lengths", "a model shared among ranks does not decode; gather its weights first"),
        ("positions", "position_ids: needed, for this rank's tokens lie anywhere in their sequence; split() adds them"),
    ],
)
def test_what_cannot_be_meant_is_refused_on_every_rank(which, message):
    assert all(message in found for found in run(2, refused, which))


def test_groups_of_mamba_heads_are_not_taken_apart():
    one_group = SHARED.model_copy(update={"n_groups": 1})
    with pytest.raises(ConfigError, match="tensor: 2 does not divide n_groups 1; choose 1"):
        parallelize(Decoder(one_group), Mapping(tensor=2))


def test_fp8_leaves_alone_what_is_more_than_a_product():
    """It would go around the sum of the key heads' gradients, and add a bias once a rank."""
    assert run(2, linear_layers) == [["gate_proj", "in_proj", "out_proj", "q_proj", "up_proj"]] * 2


def test_alone_nothing_is_replaced():
    model = decoder()
    before = {name: (id(module), module.forward.__func__) for name, module in model.named_modules()}
    parallel = parallelize(model, Mapping())
    assert {name: (id(module), module.forward.__func__) for name, module in parallel.model.named_modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert "context" not in vars(model)
