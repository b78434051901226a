"""Objectives on a tiny model, against torch's own cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from tiny_training import TinyModel, random_batch

from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.train.losses import next_token, token_logprobs


def plain_logits(model, batch):
    return model.lm_head(model(batch["input_ids"]))


@pytest.mark.parametrize("masked", [0.0, 0.4], ids=["all", "some"])
def test_next_token_is_the_summed_cross_entropy_of_labelled_positions(masked):
    model, batch = TinyModel(), random_batch(5, seed=1, masked=masked)
    loss = next_token(model, batch)
    expected = F.cross_entropy(plain_logits(model, batch).flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    torch.testing.assert_close(loss.sum, expected)
    assert loss.weight == int((batch["labels"] != -100).sum())
    loss.sum.backward()
    found = [p.grad.clone() for p in model.parameters()]
    for gradient, wanted in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_losses_by_source_add_up_to_the_whole():
    batch = random_batch(6, seed=2)
    loss = next_token(TinyModel(), batch, sources=["web", "math", "unused"])
    parts = {name: (float(value), int(weight)) for name, (value, weight) in loss.metrics.items()}
    assert list(parts) == ["loss/web", "loss/math", "loss/unused"]
    assert parts["loss/unused"] == (0.0, 0)
    assert sum(weight for _, weight in parts.values()) == loss.weight
    assert sum(value for value, _ in parts.values()) == pytest.approx(loss.sum.item())
    math = (batch["source_ids"] == 1) & (batch["labels"] != -100)
    losses = F.cross_entropy(
        plain_logits(TinyModel(), batch).flatten(0, 1), batch["labels"].flatten(), reduction="none"
    )
    assert parts["loss/math"][0] == pytest.approx(losses[math.flatten()].sum().item())


def test_sources_without_names_are_numbered():
    assert set(next_token(TinyModel(), random_batch(6, seed=2)).metrics) == {"loss/0", "loss/1"}


def test_the_balance_of_experts_joins_the_loss_only_while_training():
    config = ModelConfig(
        pattern="ME-", vocab_size=64, hidden_size=8, intermediate_size=8, mamba_num_heads=2, mamba_head_dim=4,
        n_routed_experts=4, moe_intermediate_size=4,
    )  # fmt: skip
    model, batch = Decoder(config), random_batch(3, seed=0, masked=0.5)
    labels = int((batch["labels"] != -100).sum())
    balanced = next_token(model, batch)
    with torch.no_grad():
        plain = next_token(model, batch)
    value, weight = balanced.metrics["balance"]
    assert weight == labels
    assert value > labels
    assert balanced.sum.item() == pytest.approx(plain.sum.item() + 0.01 * value.item())
    assert not plain.metrics.keys() & {"balance", "imbalance"}


def test_token_logprobs_keep_the_shape_and_are_zero_where_unlabelled():
    model, batch = TinyModel(), random_batch(4, seed=3)
    logprobs, entropy = token_logprobs(model, batch, 0.8)
    distribution = torch.log_softmax(plain_logits(model, batch) / 0.8, -1)
    labelled = batch["labels"] != -100
    expected = distribution.gather(2, batch["labels"].clamp(min=0)[..., None]).squeeze(2)
    torch.testing.assert_close(logprobs, expected * labelled)
    torch.testing.assert_close(entropy, -(distribution.exp() * distribution).sum(2) * labelled)
    weights = torch.randn(labelled.shape)
    found = torch.autograd.grad((logprobs * weights).sum(), model.mixer.weight)[0]
    wanted = torch.autograd.grad((expected * labelled * weights).sum(), model.mixer.weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_forbidden_token_has_probability_zero():
    model, batch = TinyModel(), random_batch(4, seed=3, masked=0.0)
    forbidden = torch.zeros(13, dtype=torch.bool)
    forbidden[int(batch["labels"][0, 0])] = True
    logprobs, _ = token_logprobs(model, batch, 1.0, forbidden)
    assert logprobs[0, 0].exp() == 0
    labelled = plain_logits(model, batch).masked_fill(forbidden, -torch.inf).log_softmax(-1)
    allowed = ~forbidden[batch["labels"]]
    torch.testing.assert_close(logprobs[allowed], labelled.gather(2, batch["labels"][..., None]).squeeze(2)[allowed])


def test_temperature_zero_is_refused():
    with pytest.raises(ConfigError, match="temperature: 0 gives no distribution"):
        token_logprobs(TinyModel(), random_batch(1, seed=0), 0.0)
