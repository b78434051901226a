"""Balancing of experts against the formulas written out, differentiated by autograd."""

import pytest
import torch

from bloomery.errors import ConfigError
from bloomery.model import balance
from bloomery.model.balance import BalanceConfig
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.model.moe import MoE

EXPERTS, CHOICES, HIDDEN, BATCH, SEQ = 5, 2, 6, 3, 7


def make(activation="softmax", pattern="M-E", **more):
    torch.manual_seed(3)
    config = ModelConfig(
        pattern=pattern, vocab_size=32, hidden_size=HIDDEN, intermediate_size=8, mamba_num_heads=2, mamba_head_dim=4,
        ssm_state_size=4, n_routed_experts=EXPERTS, num_experts_per_tok=CHOICES, moe_intermediate_size=4,
        router_activation=activation, initializer_range=0.5, **more,
    )  # fmt: skip
    return Decoder(config).double().train()


def layer(activation="softmax", **config):
    moe = make(activation).layers[2].mixer
    assert isinstance(moe, MoE)
    moe.balancing.config = BalanceConfig(**config)
    return moe


def inputs(seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, SEQ, HIDDEN, generator=draw, dtype=torch.float64)
    return x, torch.rand(BATCH, SEQ, generator=draw) < 0.6


def formula(moe, x, labelled, counted=None, seen=None):
    """weight·Σ labels·E·Σ_i f_i·P_i + z_weight·labels·mean(logsumexp²), by arXiv 2101.03961 and 2202.08906."""
    config, total = moe.balancing.config, 0.0
    counted = torch.ones(BATCH, SEQ, dtype=torch.bool) if counted is None else counted
    units = [slice(row, row + 1) for row in range(BATCH)] if config.kind == "sequence" else [slice(0, BATCH)]
    for unit in units:
        tokens = x[unit][counted[unit]]
        indices, _, scores, _ = moe.gate(tokens)
        share = torch.bincount(indices.flatten(), minlength=EXPERTS).double()
        if seen is not None:
            seen += share
            share = seen
        share = share / share.sum()
        mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
        total = total + config.weight * labelled[unit].sum().item() * EXPERTS * (share * mean).sum()
    logits = moe.gate(x[counted]).logits
    return total + config.z_weight * labelled.sum().item() * logits.logsumexp(-1).square().mean()


def gradients(moe, loss):
    tensors = [moe.gate.weight, moe.experts.up_proj]
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", ["batch", "sequence"])
def test_terms_and_their_gradients_are_those_of_the_formula(kind, padded, activation):
    moe, (x, labelled) = layer(activation, kind=kind, weight=0.3, z_weight=0.02), inputs()
    counted = torch.arange(SEQ) < torch.tensor([[7], [4], [6]]) if padded else None
    labelled &= True if counted is None else counted
    balance.weigh(moe, labelled, counted)
    found = gradients(moe, moe(x).square().sum())
    extra, metrics = balance.terms(moe)
    moe.eval()
    added = formula(moe, x, labelled, counted)
    wanted = gradients(moe, moe(x).square().sum() + added)
    torch.testing.assert_close(extra, added.detach(), rtol=1e-12, atol=0)
    for ours, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-14)
    assert metrics["balance"][1] == labelled.sum()


def test_the_global_load_is_that_of_the_step_so_far():
    moe = layer(kind="global", weight=0.3)
    seen, batches = torch.zeros(EXPERTS, dtype=torch.float64), [inputs(seed) for seed in range(3)]
    for x, labelled in batches:
        balance.weigh(moe.train(), labelled)
        found = gradients(moe, moe(x).square().sum())
        wanted = gradients(moe.eval(), moe(x).square().sum() + formula(moe, x, labelled, seen=seen))
        for ours, true in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-14)
    balance.after_step(moe)
    seen.zero_()
    balance.weigh(moe.train(), batches[0][1])
    moe(batches[0][0])
    torch.testing.assert_close(balance.terms(moe)[0], formula(moe, *batches[0], seen=seen).detach())


def test_the_balance_is_one_when_even_and_more_when_not():
    scores = torch.tensor([[0.4, 0.4, 0.1, 0.1]] * 2)
    for chosen, probability, expected in [
        ([[0, 1], [2, 3]], torch.full((2, 4), 0.25), 1.0),
        ([[0, 1], [0, 1]], scores, 1.6),
    ]:
        balancing = balance.Balancing(layer().gate, layers=1)
        indices = torch.tensor(chosen)
        balancing(balance.Routing(indices, torch.ones(2, 2), probability, probability.log()), 1)
        assert balancing.found.balance.item() == pytest.approx(expected)


def test_without_weighing_no_gradient_is_added():
    moe, (x, labelled) = layer(weight=10.0), inputs()
    plain = gradients(moe.eval(), moe(x).square().sum())
    balance.weigh(moe.train(), labelled)
    moe(x)  # uses the labels up: another objective's forward pass must not meet them
    for ours, true in zip(gradients(moe, moe(x).square().sum()), plain, strict=True):
        assert torch.equal(ours, true)
    assert balance.terms(moe) is None


def test_the_bias_moves_towards_experts_with_less_load_and_forgets_it():
    moe, (x, _) = layer("sigmoid", bias_rate=0.125), inputs()
    load = sum(torch.bincount(moe.gate(part.flatten(0, 1)).indices.flatten(), minlength=EXPERTS) for part in (x, -x))
    moe(x)
    moe(-x)
    balance.after_step(moe)
    assert load.tolist() != [load.double().mean()] * EXPERTS
    torch.testing.assert_close(
        moe.gate.e_score_correction_bias, 0.125 * (load.double().mean() - load).sign(), rtol=0, atol=0
    )
    before = moe.gate.e_score_correction_bias.clone()
    balance.after_step(moe)
    assert torch.equal(moe.gate.e_score_correction_bias, before)


def test_the_bias_evens_out_a_load():
    moe, (x, _) = layer("sigmoid", bias_rate=0.02), inputs()
    peaks = []
    for _ in range(60):
        moe(x)
        peaks.append(moe.balancing.found.peak.item())
        balance.after_step(moe)
    assert peaks[0] > 1.4
    assert sum(peaks[-10:]) / 10 < 1.2


def test_recomputed_activations_count_once_and_give_the_same_gradients():
    decoder = make("sigmoid", pattern="MEME")
    balance.install(decoder, BalanceConfig(kind="global", z_weight=0.01, bias_rate=0.1))
    ids = torch.randint(32, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    found, loads = [], []
    for recompute in (False, True):
        decoder.zero_grad()
        losses = []
        for batch in (
            ids,
            ids.flip(1),
        ):  # both in flight, as in a pipeline: the second has changed the load seen so far
            balance.weigh(decoder, batch > 3)
            losses.append(decoder(batch, checkpoint_activations=recompute).square().sum())
        for loss in losses:
            loss.backward()
        found.append([parameter.grad.clone() for parameter in decoder.layers.parameters()])
        loads.append([each.take_load() for each in balance.balancings(decoder)])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-15)
    assert [load.tolist() for load in loads[0]] == [load.tolist() for load in loads[1]]
    assert all(load.sum() == 2 * BATCH * SEQ * CHOICES for load in loads[1])


def test_a_bias_that_no_router_has_is_refused():
    with pytest.raises(ConfigError, match=r"balance.bias_rate: 0.001, but the model's softmax router has no selection"):
        balance.install(make(), BalanceConfig(bias_rate=1e-3))
