"""One model, every way of running it: whole, in pieces, token by token, packed, padded. All must agree."""

import itertools

import pytest
import torch
from torch import Tensor

from bloomery.model import balance
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.model.moe import MoE
from bloomery.model.state import DecodeState

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 6, "n_groups": 2, "chunk_size": 8,
    "n_routed_experts": 4, "moe_intermediate_size": 12,
}  # fmt: skip
MODELS = {
    "hybrid": {"pattern": "M-M*-E"},
    "clamped": {"pattern": "MM-", "time_step_limit": (0.01, 0.05), "use_conv_bias": False},
    "dense": {"pattern": "*-*-", "rope": RopeConfig(), "mlp_gated": True, "mlp_hidden_act": "silu", "qk_norm": True},
    "windowed": {"pattern": "*-M*", "sliding_window": 5, "attention_bias": True},
}
SEQ = 29


def make(name: str) -> Decoder:
    torch.manual_seed(7)
    decoder = Decoder(ModelConfig(**SIZES | MODELS[name])).eval()
    with torch.no_grad():
        for parameter_name, parameter in decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8 if "conv1d" not in parameter_name else 1)  # make layers matter next to the residual
    return decoder


@pytest.fixture(params=MODELS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make(request.param)


def tokens(batch: int, seq: int = SEQ) -> Tensor:
    return torch.randint(0, 61, (batch, seq), generator=torch.Generator().manual_seed(3))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_prefill_in_pieces_and_decoding_equal_one_forward(decoder: Decoder) -> None:
    ids = tokens(3)
    state = DecodeState.allocate(decoder.config, 3, SEQ + 2)
    pieces = [decoder(ids[:, a:b], state=state) for a, b in [(0, 11), (11, 12), (12, 21)]]
    pieces += [decoder(ids[:, t : t + 1], state=state) for t in range(21, SEQ)]
    close(torch.cat(pieces, 1), decoder(ids))
    assert state.lengths.tolist() == [SEQ] * 3


@torch.no_grad()
def test_right_padding_changes_nothing(decoder: Decoder) -> None:
    ids, lengths = tokens(3), torch.tensor([5, 20, 13])
    whole = decoder(ids)
    state = DecodeState.allocate(decoder.config, 3, SEQ + 2)
    padded = torch.where(torch.arange(20) < lengths[:, None], ids[:, :20], 60)
    prefilled = decoder(padded, state=state, lengths=lengths)
    assert state.lengths.tolist() == lengths.tolist()
    for row, length in enumerate(lengths.tolist()):
        close(prefilled[row, :length], whole[row, :length])
    for step in range(4):  # rows at different lengths go on together
        following = ids.gather(1, (lengths + step)[:, None])
        hidden = decoder(following, state=state)
        close(hidden[:, 0], whole[torch.arange(3), lengths + step])
    more = torch.stack([ids[row, length + 4 : length + 9] for row, length in enumerate(lengths.tolist())])
    hidden = decoder(more, state=state)  # and a second piece of prompt, from different lengths
    close(hidden, torch.stack([whole[row, length + 4 : length + 9] for row, length in enumerate(lengths.tolist())]))


@torch.no_grad()
def test_only_the_last_token_of_each_row(decoder: Decoder) -> None:
    ids, lengths = tokens(3), torch.tensor([5, 20, 13])
    close(decoder(ids, only_last=True), decoder(ids)[:, -1:])
    found, expected = (DecodeState.allocate(decoder.config, 3, SEQ) for _ in range(2))
    last = decoder(ids[:, :20], state=found, lengths=lengths, only_last=True)
    whole = decoder(ids[:, :20], state=expected, lengths=lengths)
    close(last[:, 0], whole[torch.arange(3), lengths - 1])
    following = ids[:, 20:21]
    close(decoder(following, state=found), decoder(following, state=expected))  # the memory is complete


@torch.no_grad()
def test_rows_can_stand_still(decoder: Decoder) -> None:
    ids = tokens(2)
    state = DecodeState.allocate(decoder.config, 2, SEQ)
    decoder(ids[:, :6], state=state)
    decoder(ids[:, 6:7], state=state, lengths=torch.tensor([1, 0]))
    assert state.lengths.tolist() == [7, 6]


@pytest.mark.parametrize("cuts", [(1, 8, 9), (7, 16, 24), (8, 9, 10), (3, 20, 28)])
def test_packed_documents_equal_separate_ones(decoder: Decoder, cuts: tuple[int, ...]) -> None:
    ids = tokens(1)
    borders = [0, *cuts, SEQ]
    lengths = torch.tensor(borders[1:]) - torch.tensor(borders[:-1])
    segment_ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    position_ids = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    separate = torch.cat([decoder(ids[:, a:b]) for a, b in itertools.pairwise(borders)], 1)
    close(decoder(ids, segment_ids, position_ids), separate)
    close(decoder(ids, segment_ids), separate)  # rotary positions are relative


@torch.no_grad()
@pytest.mark.parametrize("border", [1, 7, 8, 9, 13, SEQ - 1])
def test_documents_are_isolated_to_the_bit(decoder: Decoder, border: int) -> None:
    ids = tokens(2)
    segment_ids = (torch.arange(SEQ) >= border).long().expand(2, -1) + torch.tensor([[0], [5]])
    before = decoder(ids, segment_ids)
    changed = ids.clone()
    changed[:, border - 1] = (changed[:, border - 1] + 1) % 61
    after = decoder(changed, segment_ids)
    assert torch.equal(before[:, border:], after[:, border:])
    assert not torch.equal(before[:, border - 1], after[:, border - 1])


@torch.no_grad()
def test_left_padding_is_a_document_of_its_own(decoder: Decoder) -> None:
    """So a tokenizer's attention mask is the `segment_ids` of a left-padded batch, as it stands."""
    ids, lengths = tokens(3), (5, 20, 13)
    padded, attention_mask = torch.full((3, 20), 60), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, 20 - length :], attention_mask[row, 20 - length :] = ids[row, :length], 1
    found = decoder(padded, segment_ids=attention_mask)
    for row, length in enumerate(lengths):
        close(found[row, 20 - length :], decoder(ids[row : row + 1, :length])[0])


def test_gradients_do_not_cross_documents() -> None:
    decoder = make("hybrid")
    ids = torch.arange(SEQ)[None]
    decoder(ids, (ids >= 13).long())[:, 13:].square().sum().backward()
    reached = decoder.embeddings.weight.grad.abs().amax(1)
    assert reached[:13].max() < 1e-6 * reached[13:SEQ].min()  # the scan's sums leave rounding behind, no more


def test_recomputed_activations_give_the_same_gradients(decoder: Decoder) -> None:
    decoder.train()
    gradients = []
    for recompute in (False, True):
        decoder.zero_grad()
        balance.weigh(decoder, tokens(2) >= 0)
        decoder(tokens(2), checkpoint_activations=recompute).square().sum().backward()
        gradients.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_slots_can_be_filled_freed_and_moved() -> None:
    decoder = make("hybrid")
    ids = tokens(3)
    running = DecodeState.allocate(decoder.config, 4, SEQ)
    for slots, rows, length in [([2, 0], [0, 1], 9), ([3], [2], 15)]:
        fresh = DecodeState.allocate(decoder.config, len(rows), 20)
        decoder(ids[rows, :length], state=fresh)
        running.put(torch.tensor(slots), fresh)
    assert running.lengths.tolist() == [9, 0, 9, 15]
    whole = decoder(ids)
    hidden = decoder(torch.stack([ids[1, 9], ids[0, 0], ids[0, 9], ids[2, 15]])[:, None], state=running)
    close(hidden[[2, 0, 3], 0], torch.stack([whole[0, 9], whole[1, 9], whole[2, 15]]))
    running.put(torch.tensor([1]), running.take(torch.tensor([3])))
    hidden = decoder(torch.stack([ids[1, 10], ids[2, 16]])[:, None], state=running.head(2))
    close(hidden[:, 0], torch.stack([whole[1, 10], whole[2, 16]]))
    assert running.lengths.tolist() == [11, 17, 10, 16]
    running.clear(torch.tensor([0]))
    hidden = decoder(ids[:1, :1], state=running.head(1))
    close(hidden[:, 0], whole[:1, 0])


def test_experts_equal_a_loop_over_tokens() -> None:
    torch.manual_seed(1)
    mixer = MoE(
        ModelConfig(
            **SIZES | {"pattern": "ME", "mlp_gated": True, "mlp_hidden_act": "silu", "routed_scaling_factor": 2.5}
        )
    )
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mixer.gate.e_score_correction_bias[2] = 0.5
    x = torch.randn(3, 5, 24, requires_grad=True)
    found = mixer(x)
    expected = torch.zeros(15, 24)
    for token, vector in enumerate(x.flatten(0, 1)):
        scores = (mixer.gate.weight @ vector).sigmoid()
        chosen = (scores + mixer.gate.e_score_correction_bias).topk(2).indices
        for expert in chosen.tolist():
            inner = torch.nn.functional.silu(mixer.experts.gate_proj[expert] @ vector) * (
                mixer.experts.up_proj[expert] @ vector
            )
            share = scores[expert] / scores[chosen].sum() * 2.5
            expected[token] += share * (mixer.experts.down_proj[expert] @ inner)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(expected)
    tensors = [x, *mixer.parameters()]
    for ours, true in zip(
        torch.autograd.grad(found.flatten(0, 1), tensors, weights, retain_graph=True),
        torch.autograd.grad(expected, tensors, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, true, rtol=1e-3, atol=1e-5)


def test_experts_run_in_bfloat16_autocast() -> None:
    decoder = make("hybrid").train()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = decoder(tokens(2))
    hidden.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.layers.parameters())


def test_initial_values() -> None:
    torch.manual_seed(0)
    config = ModelConfig(**SIZES | {"pattern": "M-M*" * 4, "hidden_size": 128, "mamba_num_heads": 64, "n_groups": 1})
    decoder = Decoder(config)
    mixer = decoder.layers[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 1e-4
    assert dt.max() <= 0.1 + 1e-6
    assert mixer.A_log.exp().min() >= 1
    assert mixer.A_log.exp().max() <= 16
    assert (mixer.D == 1).all()
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.out_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_meta_device_builds_without_memory() -> None:
    with torch.device("meta"):
        decoder = Decoder(ModelConfig(**SIZES | MODELS["hybrid"]))
    assert all(p.is_meta for p in decoder.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"shape \(2, 0\)"),
        (
            {"input_ids": tokens(1, 4), "segment_ids": torch.tensor([[0, 1, 0, 0]])},
            "row 0 falls from 1 to 0 at position 2",
        ),
        ({"input_ids": tokens(1, 4), "segment_ids": torch.tensor([[0, 1]])}, r"shape \(1, 2\), expected \(1, 4\)"),
        (
            {"input_ids": tokens(2, 4), "lengths": torch.tensor([0, 4])},
            r"lengths: \[0, 4\], expected 2 values from 1 to 4",
        ),
        ({"input_ids": tokens(2, 4), "state": 3}, r"state: 3 rows, expected 2"),
        ({"input_ids": tokens(2, 9), "state": 2}, "0 tokens held and 9 new ones, room for 8"),
        ({"input_ids": tokens(2, 4), "state": 2, "segment_ids": torch.zeros(2, 4)}, "segment_ids and state together"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(arguments: dict[str, object], message: str) -> None:
    decoder = make("hybrid")
    if "state" in arguments:
        arguments = arguments | {"state": DecodeState.allocate(decoder.config, arguments["state"], 8)}
    with pytest.raises(ValueError, match=message):
        decoder(**arguments)
