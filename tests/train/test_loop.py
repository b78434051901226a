"""The step generator: the same trajectory however the batch is cut, and no step that should not be taken."""

import math

import pytest
import torch
from tiny_training import TinyModel, loop, new_state, random_batch, split, stream

from bloomery import config as configs
from bloomery.errors import ConfigError, DivergenceError
from bloomery.train.loop import LoopConfig, computes_in_bf16, steps
from bloomery.train.losses import Loss, next_token
from bloomery.train.schedule import learning_rate


def run(config, state=None, batches=None, objective=next_token):
    state = state or new_state(config)
    return state, list(steps(state, batches or stream(state.position, config), objective, config))


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def test_it_learns_and_counts():
    config = loop(max_steps=150)
    state, done = run(config)
    assert [step.step for step in done] == list(range(1, 151))
    assert (state.step, state.position) == (150, 600)
    assert {step.tokens for step in done} == {24}
    assert done[0].loss == pytest.approx(math.log(13), rel=0.3)
    assert done[-1].loss < 0.3
    assert set(done[-1].metrics) <= {"loss/0", "loss/1"}


def test_accumulation_equals_the_large_batch():
    settings = {"max_steps": 4, "eps": 1e-3}  # a small eps turns rounding of tiny gradients into whole updates
    big, small = loop(**settings), loop(**settings, micro_batch_size=1)
    (one, a), (many, b) = run(big), run(small)
    torch.testing.assert_close(weights(one), weights(many), rtol=1e-6, atol=1e-6)
    for x, y in zip(a, b, strict=True):
        assert (x.loss, x.grad_norm) == pytest.approx((y.loss, y.grad_norm), rel=1e-6)
        assert x.metrics == pytest.approx(y.metrics, rel=1e-6)


def test_accumulation_weighs_tokens_not_micro_batches():
    """With unequal masks the mean of micro-batch means is another number; the step must use the global mean."""
    config = loop(max_steps=1, batch_size=2, micro_batch_size=1)
    batch = random_batch(2, seed=0, masked=0.0)
    batch["labels"][0, 1:] = -100
    _, (step,) = run(config, batches=iter([split(batch, 1)]))
    model = TinyModel()
    parts = [next_token(model, part) for part in split(batch, 1)]
    assert [part.weight for part in parts] == [1, 6]
    assert step.loss == pytest.approx(sum(part.sum.item() for part in parts) / 7)
    assert step.loss != pytest.approx(sum(part.sum.item() / part.weight for part in parts) / 2, rel=1e-3)


def test_the_update_is_plain_adamw_with_clipping_and_schedule():
    config = loop(max_steps=3, max_grad_norm=0.05, warmup_steps=2, weight_decay=0.1, decay_fraction=0.3)
    state, done = run(config)
    reference = new_state(config)
    optimizer = torch.optim.AdamW(reference.optimizer.param_groups, betas=config.betas, eps=config.eps)
    for step, (batch,) in zip(range(1, 4), stream(0, config), strict=False):
        logits = reference.model.lm_head(reference.model(batch["input_ids"]))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.model.parameters(), 0.05)
        assert norm.item() == pytest.approx(done[step - 1].grad_norm, rel=1e-5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 3, 1e-2, "wsd", 2, 0.3, config.min_ratio)
        optimizer.step()
    assert norm > 0.05
    torch.testing.assert_close(weights(state), weights(reference), rtol=1e-5, atol=1e-6)


def test_batches_are_pulled_after_the_step_before():
    config = loop(max_steps=3)
    state, seen = new_state(config), []

    def on_policy():
        for micro_batches in stream(0, config):
            seen.append(weights(state))
            yield micro_batches

    after = [weights(state), *(weights(state) for _ in steps(state, on_policy(), next_token, config))]
    assert len(seen) == 3
    assert all(torch.equal(sampled, trained) for sampled, trained in zip(seen, after[:3], strict=True))
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(value):
    config = loop(batch_size=4, micro_batch_size=2)
    state, calls = new_state(config), []

    def objective(model, batch):
        calls.append(1)
        loss = next_token(model, batch, sources=["web", "math"])
        return Loss(loss.sum * (value if len(calls) == 6 else 1), loss.weight, loss.metrics)

    generator = steps(state, stream(0, config), objective, config)
    next(generator), next(generator)
    before = weights(state)
    expected = (
        rf"step 3, sequences from 8 \(sources .*\): the loss of micro-batch 2 of 2 is {value}; no weight was changed"
    )
    with pytest.raises(DivergenceError, match=expected):
        next(generator)
    assert torch.equal(weights(state), before)
    assert (state.step, state.position) == (2, 8)


def test_a_gradient_that_is_not_finite_stops_too():
    config = loop()
    state = new_state(config)
    before = weights(state)

    def objective(model, batch):
        loss = next_token(model, batch)
        return Loss(loss.sum + torch.sqrt(model.mixer.weight.sum() * 0), loss.weight)  # √0 has an infinite slope

    with pytest.raises(DivergenceError, match="step 1.*the loss is finite but the gradient norm is nan"):
        next(steps(state, stream(0, config), objective, config))
    assert torch.equal(weights(state), before)


def test_a_batch_without_labels_is_refused_but_one_such_micro_batch_is_not():
    config = loop(max_steps=1, batch_size=2, micro_batch_size=1)
    batch = random_batch(2, seed=0)
    batch["labels"][0] = -100
    _, (step,) = run(config, batches=iter([split(batch, 1)]))
    assert math.isfinite(step.loss)
    batch["labels"][1] = -100
    with pytest.raises(
        DivergenceError, match="step 1, sequences from 0: every label is masked.*check the data's loss mask"
    ):
        run(config, batches=iter([split(batch, 1)]))


def test_data_that_ends_early_is_refused():
    config = loop(max_steps=3)
    with pytest.raises(ConfigError, match="max_steps: the data ended after step 1 of 3, at sequence 4"):
        run(config, batches=iter([[random_batch(4, seed=0)]]))


def test_it_goes_on_from_a_state_in_the_middle():
    config = loop(max_steps=6)
    whole, done = run(config)
    state, first = new_state(config), []
    for step in steps(state, stream(0, config), next_token, config):
        first.append(step)
        if step.step == 4:
            break
    _, rest = run(config, state)
    assert [s.loss for s in [*first, *rest]] == [s.loss for s in done]
    assert torch.equal(weights(state), weights(whole))


def test_validation_between_steps_leaves_training_mode_to_the_loop():
    config = loop(max_steps=2)
    state, modes = new_state(config), []

    def objective(model, batch):
        modes.append(model.training)
        return next_token(model, batch)

    for _ in steps(state, stream(0, config), objective, config):
        state.model.eval()
    assert modes == [True, True]


def test_activation_checkpointing_is_on_inside_the_step_only():
    config = loop(max_steps=1, activation_checkpointing=True)
    state, _ = run(config)
    assert state.model.recomputed
    state.model(torch.zeros(1, 2, dtype=torch.int64))
    assert not state.model.recomputed


def test_precision():
    model, cpu = TinyModel(), torch.device("cpu")
    assert not computes_in_bf16(loop(), model, cpu)  # 8 channels: too narrow anywhere
    assert computes_in_bf16(loop(precision="bf16"), model, cpu)
    assert not computes_in_bf16(loop(precision="fp32"), model, torch.device("cuda"))
    assert computes_in_bf16(loop(), model, torch.device("cuda"))
    _, (exact,) = run(loop(max_steps=1))
    _, (rounded,) = run(loop(max_steps=1, precision="bf16"))
    assert exact.loss != rounded.loss
    assert exact.loss == pytest.approx(rounded.loss, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size 4 does not divide batch_size 6"),
        ({"warmup_steps": 11}, "warmup_steps 11 is more than max_steps 10"),
        ({"warmup_steps": 9}, "warmup_steps 9 reaches into the decay of the last 0.2 of 10 steps"),
        ({"learning_rat": 1e-3}, "learning_rat: unknown key; did you mean learning_rate"),
        ({"trackers": ["mlflow"]}, "trackers"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(ConfigError, match=message):
        configs.build(LoopConfig, {"max_steps": 10, **settings})


def test_the_micro_batch_is_the_batch_where_not_given():
    assert LoopConfig(max_steps=1, batch_size=12).micro_batch_size == 12
