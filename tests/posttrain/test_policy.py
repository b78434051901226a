"""Micro-batches and the policy-gradient objective: any split gives the gradient of a plain loop over tokens."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from bloomery.data.pack import IGNORE, Batch
from bloomery.data.prompts import Prompt
from bloomery.errors import DivergenceError
from bloomery.generate import Completion
from bloomery.posttrain.batches import Row, from_json, micro_batches, split_by_length, to_json
from bloomery.posttrain.policy import PolicyGradient, add_logprobs
from bloomery.posttrain.rl_config import Clip, Correction, Overlong
from bloomery.posttrain.rollouts import Rollouts, Sample
from bloomery.verify import Verdict

VOCAB, TEMPERATURE, MAX_NEW = 11, 0.6, 8


class Recurrent(nn.Module):
    """The smallest causal model with the decoder's interface."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.cell = nn.Embedding(VOCAB, 8), nn.GRU(8, 8, batch_first=True)
        self.lm_head = nn.Linear(8, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor, segment_ids: None = None, position_ids: None = None) -> torch.Tensor:
        return self.cell(self.embedding(input_ids))[0]


def logprobs_of(model: nn.Module, prompt: tuple[int, ...], completion: list[int]) -> torch.Tensor:
    logits = model.lm_head(model(torch.tensor([[*prompt, *completion]])))[0] / TEMPERATURE
    return torch.log_softmax(logits, -1)[torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1), completion]


def sample(model: nn.Module, prompt: Prompt, length: int, score: float | None) -> Sample:
    tokens = torch.randint(0, VOCAB, (length,)).tolist()
    with torch.no_grad():
        logprobs = logprobs_of(model, prompt.ids, tokens).tolist()
    status = "infra_error" if score is None else "correct" if score else "wrong"
    return Sample(prompt, Completion(tokens, logprobs, "stop", 0, ""), Verdict.of(status))


SCORES: list[list[float | None]] = [[1, 0, 0, 1], [0, 0, 0, 0], [1, None, 0, 0], [None, None, None, 1]]


@pytest.fixture
def rollouts() -> Rollouts:
    model = Recurrent()
    prompts = [Prompt(str(i), "s", [], "", "", tuple(range(1, i + 3))) for i in range(len(SCORES))]
    lengths = iter([3, 8, 1, 5, 2, 4, 6, 7, 3, 3, 8, 2, 1, 1, 5, 4])
    pairs = zip(prompts, SCORES, strict=True)
    return Rollouts([[sample(model, prompt, next(lengths), score) for score in scores] for prompt, scores in pairs])


def gradient(model: nn.Module, losses: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    pairs = list(losses)
    (sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def by_batches(rollouts: Rollouts, budget: int, how: str, **options: bool) -> tuple[torch.Tensor, int]:
    model, objective = Recurrent(), PolicyGradient(TEMPERATURE, 1e-4)
    batches = micro_batches(rollouts, budget, 0, how, MAX_NEW, **options)  # type: ignore[arg-type]
    losses = [objective(model, batch) for batch in batches]
    return gradient(model, ((loss.sum, loss.weight) for loss in losses)), len(batches)  # type: ignore[misc]


def by_loop(rollouts: Rollouts, how: str) -> torch.Tensor:
    """Every token on its own; advantages by the textbook."""
    model, total = Recurrent(), []
    judged = [[s for s in group if s.verdict.score is not None] for group in rollouts.groups]
    judged = [group for group in judged if len(group) > 1]
    tokens = sum(s.tokens for group in judged for s in group)
    for group in judged:
        rewards = torch.tensor([s.verdict.score for s in group], dtype=torch.float64)
        gains = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        divisor = {
            "token_mean": lambda s: tokens,
            "group_token_mean": lambda s, group=group: len(judged) * sum(s.tokens for s in group),
            "seq_mean_token_mean": lambda s: s.tokens * sum(map(len, judged)),
            "seq_mean_token_sum_norm": lambda s: MAX_NEW * sum(map(len, judged)),
        }[how]
        for s, gain in zip(group, gains, strict=True):
            for logprob in logprobs_of(model, s.prompt.ids, s.completion.token_ids):
                total.append(-gain.float() * logprob / divisor(s))
    return gradient(model, iter([(torch.stack(total).sum(), torch.ones(()))]))


@pytest.mark.parametrize("how", ["token_mean", "group_token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
def test_any_split_gives_the_gradient_of_the_plain_loop(rollouts: Rollouts, how: str) -> None:
    expected = by_loop(rollouts, how)
    whole, one = by_batches(rollouts, 10_000, how)
    split, many = by_batches(rollouts, 1, how)
    everything, _ = by_batches(rollouts, 4, how, keep_all=True)
    assert (one, many) == (1, 7)  # the rows with an advantage: 4 + 3
    assert expected.abs().max() > 1e-3
    for found in (whole, split, everything):
        assert torch.allclose(found, expected, atol=1e-6), (found - expected).abs().max()


def test_batches_hold_the_generators_own_tokens(rollouts: Rollouts) -> None:
    for batch in micro_batches(rollouts, 1, 0, "token_mean", MAX_NEW):
        labels = batch["labels"][0]
        start = int((labels != IGNORE).nonzero()[0])
        found = (tuple(batch["input_ids"][0, : start + 1].tolist()), labels[start:].tolist())
        assert found in [(s.prompt.ids, s.completion.token_ids) for s in rollouts.samples]
        assert batch["generator_logprobs"][0, start:].lt(0).all()


def test_rows_without_verdict_and_rows_left_alone_are_masked(rollouts: Rollouts) -> None:
    batches = micro_batches(rollouts, 4, 0, "token_mean", MAX_NEW, keep_all=True)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 3]
    tokens = sum(s.tokens for group in rollouts.groups[:3] for s in group if s.verdict.score is not None)
    assert sum(batch["loss_weight"].item() for batch in batches) == pytest.approx(tokens)


def test_short_rows_are_not_padded_to_the_longest() -> None:
    prompt = Prompt("p", "s", [], "", "", (1,))
    rows = [Row(Sample(prompt, Completion([2] * n, [-1.0] * n, "stop", 0, ""), Verdict.of("wrong")), 1.0, 1.0)
            for n in [40, 10, 100] * 20]  # fmt: skip
    parts = split_by_length(rows, 32)
    assert [len(part) for part in parts] == [20, 20, 20]
    assert [{row.length for row in part} for part in parts] == [{100}, {40}, {10}]
    assert [len(part) for part in split_by_length(rows[:30], 8)] == [8, 8, 8, 6]


def test_on_policy_certificate(rollouts: Rollouts) -> None:
    batch = micro_batches(rollouts, 10_000, 0, "token_mean", MAX_NEW)[0]
    objective = PolicyGradient(TEMPERATURE, 1e-4)
    metrics = objective(Recurrent(), batch).metrics
    assert objective.largest_gap < 1e-5
    assert metrics["logprob_gap"][0] / metrics["logprob_gap"][1] <= objective.largest_gap
    with pytest.raises(DivergenceError, match="not from the policy being trained"):
        objective(Recurrent(seed=1), batch)
    with pytest.raises(DivergenceError, match="another temperature"):
        PolicyGradient(1.0, 0.01)(Recurrent(), batch)


def test_not_a_number_is_not_on_policy(rollouts: Rollouts) -> None:
    model = Recurrent()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DivergenceError):
        PolicyGradient(TEMPERATURE, 0.05)(model, micro_batches(rollouts, 99, 0, "token_mean", MAX_NEW)[0])


def test_penalty_pulls_towards_the_reference(rollouts: Rollouts) -> None:
    batches = micro_batches(rollouts, 10_000, 0, "token_mean", MAX_NEW, keep_all=True)
    add_logprobs(Recurrent(), batches, "reference_logprobs", TEMPERATURE)
    same = PolicyGradient(TEMPERATURE, 9.0, kl=0.1)(Recurrent(), batches[0]).metrics["reference_kl"]
    assert float(same[0]) == pytest.approx(0.0, abs=1e-6)
    add_logprobs(Recurrent(seed=1), batches, "reference_logprobs", TEMPERATURE)
    loss = PolicyGradient(TEMPERATURE, 9.0, kl=0.1)(Recurrent(), batches[0])
    free = PolicyGradient(TEMPERATURE, 9.0)(Recurrent(), batches[0])
    penalty = loss.metrics["reference_kl"][0]
    assert float(penalty) > 0
    assert loss.sum.item() == pytest.approx(free.sum.item() + 0.1 * float(penalty), rel=1e-4)


def test_clipped_equals_on_policy_where_nothing_has_moved(rollouts: Rollouts) -> None:
    batch = micro_batches(rollouts, 10_000, 0, "token_mean", MAX_NEW)[0]
    batch["old_logprobs"] = batch["generator_logprobs"]
    losses = [PolicyGradient(TEMPERATURE, 1e-4, clip=clip)(Recurrent(), batch).sum.item() for clip in (None, Clip())]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def with_lengths(lengths: list[list[int]], scores: list[list[float]], limit: int = MAX_NEW) -> Rollouts:
    """Completions of these lengths; one as long as the limit was cut off."""
    model, groups = Recurrent(), []
    for number, pairs in enumerate(zip(lengths, scores, strict=True)):
        prompt = Prompt(str(number), "s", [], "", "", (1, number + 2))
        made = [sample(model, prompt, length, score) for length, score in zip(*pairs, strict=True)]
        cut = ["length" if s.tokens == limit else "stop" for s in made]
        groups.append([
            Sample(prompt, replace(s.completion, finish_reason=reason), s.verdict)
            for s, reason in zip(made, cut, strict=True)
        ])  # fmt: skip
    return Rollouts(groups)


def values_of(batches: list[Batch]) -> tuple[list[float], float]:
    """(advantages of all rows in rising order, the step's denominator)"""
    gains = sorted(gain for batch in batches for gain in batch["advantages"].tolist())
    return gains, sum(batch["loss_weight"].item() for batch in batches)


def test_overlong_filter_masks_after_the_advantages() -> None:
    """Rewards 1, 0, 0, 0 of which one zero was cut off: advantages of all four, three of them learnt and counted."""
    rollouts = with_lengths([[2, 3, 8, 4]], [[1, 0, 0, 0]])
    plain = values_of(micro_batches(rollouts, 99, 0, "token_mean", MAX_NEW))
    filtered = values_of(micro_batches(rollouts, 99, 0, "token_mean", MAX_NEW, overlong=Overlong(filter=True)))
    assert plain == (pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-5), 17.0)
    assert filtered == (pytest.approx([-0.5, -0.5, 1.5], abs=1e-5), 9.0)
    assert rollouts.mixed(skip_truncated=True)
    assert not with_lengths([[8, 8]], [[1, 0]]).mixed(skip_truncated=True)


def test_overlong_penalty_shapes_the_reward_but_makes_no_signal() -> None:
    """Limit 8 over 4 tokens: lengths 4, 6, 8 lose 0, 0.5, 1. Group 1: 1, 0.5, 0 → ±0.5 about the mean. Group 2 is all
    wrong: no length makes it a signal."""
    rollouts = with_lengths([[4, 6, 4], [4, 6, 8]], [[1, 1, 0], [0, 0, 0]])
    shaped = micro_batches(
        rollouts, 99, 0, "token_mean", MAX_NEW, scale="none", overlong=Overlong(penalty_tokens=4)
    )  # fmt: skip
    assert values_of(shaped) == (pytest.approx([-0.5, 0.5], abs=1e-6), 32.0)


def test_only_active_completions_in_the_denominator() -> None:
    rollouts = with_lengths([[2, 3], [4, 5]], [[1, 0], [1, 1]])
    assert values_of(micro_batches(rollouts, 99, 0, "token_mean", MAX_NEW))[1] == 14.0
    assert values_of(micro_batches(rollouts, 99, 0, "token_mean", MAX_NEW, active_only=True))[1] == 5.0


def test_dr_grpo_is_a_plain_difference_over_a_constant() -> None:
    """Rewards 1, 0: ±0.5 whatever the spread; every token's loss over 2 completions × 8 tokens."""
    rollouts = with_lengths([[2, 3]], [[1, 0]])
    batches = micro_batches(rollouts, 99, 0, "seq_mean_token_sum_norm", MAX_NEW, scale="none")
    assert values_of(batches) == ([-0.5, 0.5], 2.0)
    assert batches[0]["row_weights"].tolist() == [1 / 8, 1 / 8]


def test_mismatch_weights_multiply_each_tokens_loss(rollouts: Rollouts) -> None:
    """A generator that thought every token e^0.5 less likely: w = e^0.5 = 1.6487, cut at 1.5."""
    [batch] = micro_batches(rollouts, 10_000, 0, "token_mean", MAX_NEW)
    plain = PolicyGradient(TEMPERATURE, 9.0)(Recurrent(), batch).sum.item()
    shifted = {**batch, "generator_logprobs": batch["generator_logprobs"] - 0.5}
    for high, factor in ((2.0, 1.6487), (1.5, 1.5)):
        loss = PolicyGradient(TEMPERATURE, 9.0, correction=Correction(high=high))(Recurrent(), shifted)
        assert loss.sum.item() == pytest.approx(factor * plain, rel=1e-4)
        total, count = loss.metrics["mismatch_weight"]
        assert float(total) / float(count) == pytest.approx(factor, rel=1e-4)


def test_several_updates_compare_the_policy_before_them_with_the_generator(rollouts: Rollouts) -> None:
    """The second update has moved away from the samples, and that is no reason to stop."""
    [batch] = micro_batches(rollouts, 10_000, 0, "token_mean", MAX_NEW)
    add_logprobs(Recurrent(), [batch], "old_logprobs", TEMPERATURE)
    objective, moved = PolicyGradient(TEMPERATURE, 1e-4, clip=Clip()), Recurrent(seed=1)
    loss = objective(moved, batch)
    assert objective.largest_gap < 1e-5
    assert float(loss.metrics["clipped"][0]) > 0
    assert float(PolicyGradient(TEMPERATURE, 1e-4, clip=Clip())(Recurrent(), batch).metrics["clipped"][0]) == 0
    [stale] = micro_batches(rollouts, 10_000, 0, "token_mean", MAX_NEW)
    add_logprobs(moved, [stale], "old_logprobs", TEMPERATURE)
    with pytest.raises(DivergenceError, match="not from the policy being trained"):
        objective(Recurrent(), stale)


def test_what_a_checkpoint_keeps_of_a_batch_is_the_batch(rollouts: Rollouts) -> None:
    batches = micro_batches(rollouts, 4, 0, "token_mean", MAX_NEW)
    back = from_json(json.loads(json.dumps(to_json(batches))))
    for mine, theirs in zip(batches, back, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
