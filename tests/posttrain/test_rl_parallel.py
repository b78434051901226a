"""The stage on four ranks writes, judges and learns what one process does; and what stops one rank stops all."""

import copy
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
import torch
from distributed import run
from exact_training import in_float64
from rl_kills import starts_with_digit
from torch import Tensor, nn

from bloomery import artifact
from bloomery.config import build
from bloomery.data.dataset import write_rows
from bloomery.data.pack import IGNORE, Batch
from bloomery.data.prompts import Prompt
from bloomery.data.tokenizer import train_tokenizer
from bloomery.errors import BloomeryError, ConfigError
from bloomery.generate import Completion, Engine, Request
from bloomery.model import balance, hf
from bloomery.model.balance import BalanceConfig
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.posttrain import generators, policy, rl
from bloomery.posttrain.batches import micro_batches
from bloomery.posttrain.policy import PolicyGradient
from bloomery.posttrain.ranks import _dealt, _halves
from bloomery.posttrain.rl_config import RLConfig
from bloomery.posttrain.rollouts import Rollouts, Sample
from bloomery.posttrain.sampler import Sampler
from bloomery.train.losses import hidden_states
from bloomery.verify import VERIFIERS, Verdict

STEPS, CUT = 4, 3
SINGLE = torch.Tensor.float
DEGREES = {"tensor": 2, "expert": 2}  # and so data 2


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model with every kind of layer, and prompts for it."""
    folder = tmp_path_factory.mktemp("experts")
    questions = [f"{a}+{b}=" for a in range(5) for b in range(3)]
    tokenizer = train_tokenizer(questions, 262)
    torch.manual_seed(3)
    model = Decoder(ModelConfig(
        pattern="ME*-", vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2,
        chunk_size=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=1,
        moe_shared_expert_intermediate_size=8, max_position_embeddings=48,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.2,
    ))  # fmt: skip
    hf.save(model, folder / "model")
    tokenizer.save(folder / "model")
    rows = [
        {"prompt": [{"role": "user", "content": text}], "answer": "1", "verifier": "answer", "id": f"sum-{i}"}
        for i, text in enumerate(questions)
    ]
    write_rows(folder / "prompts", "sums", rows, "prompts")
    return {"model": str(folder / "model"), "prompts": str(folder / "prompts")}


def settings(world: dict[str, Any], degrees: dict[str, Any], **changes: Any) -> dict[str, Any]:
    loop = {"max_steps": STEPS, "learning_rate": 1e-2, "schedule": "constant", "checkpoint_every_steps": 100}
    # Within a micro-batch the terms would depend on how rows are grouped.
    loop |= {"balance": {"kind": "sequence", "weight": 0.1}} | changes.pop("loop", {})
    return {
        **world, "num_prompts": 6, "group_size": 4, "max_new_tokens": 3, "seed": 1, "workers": 1, "loop": loop,
        "generator": {"type": "engine", "deterministic": True}, "store_every_steps": 1, "parallel": degrees, **changes,
    }  # fmt: skip


SHARED = {
    "updates_per_batch": 2, "clip": {}, "kl": 0.1, "drop_solved": 1.0, "correction": {"kind": "seq_mask", "low": 0.9},
    "phases": [{"until_step": 2, "max_new_tokens": 2}, {"at_most": 0.9}],
}  # fmt: skip
"""A run in which updates share rollouts, with the losses, the curriculum and the buffer that come with it."""


def exact_logprobs(model: nn.Module, batch: Batch, temperature: float, _: Any = None) -> tuple[Tensor, Tensor]:
    """`losses.token_logprobs` without its float32."""
    logprobs = torch.log_softmax(hidden_states(model, batch) @ model.lm_head.weight.T / temperature, -1)
    mask = batch["labels"] != IGNORE
    own = logprobs.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    return own.masked_fill(~mask, 0.0), (-logprobs.exp() * logprobs).sum(-1).masked_fill(~mask, 0.0)


class Single(Engine):
    """Writes in float32, on a copy: float64 is for what is learnt."""

    def __init__(self, model: Decoder, *args: Any, **kwargs: Any):
        self.trained = model
        super().__init__(copy.deepcopy(model).to(torch.float32), *args, **kwargs)

    def sync(self, weights: Any = None) -> None:
        pairs = self.trained.state_dict().items() if weights is None else weights
        super().sync((name, tensor.to(torch.float32)) for name, tensor in pairs)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        with patch.object(torch.Tensor, "float", SINGLE):
            return iter(list(super().stream(requests)))


@contextmanager
def prepared(exactly: bool = True) -> Iterator[None]:
    """An easy task; and float64 wherever a rank's sums are rounded otherwise than one process's."""
    load = hf.load
    with patch.dict(VERIFIERS, {"answer": starts_with_digit}), patch.object(rl, "self_test", lambda _: None):
        if not exactly:
            yield
            return
        with (
            in_float64(), patch.object(hf, "load", lambda path, dtype: load(path, dtype).double()),
            patch.object(policy, "token_logprobs", exact_logprobs), patch.object(generators, "Engine", Single),
        ):  # fmt: skip
            yield


def train(given: dict[str, Any], out: Path, cut: int | None = None, exactly: bool = True) -> str:
    """How the stage ended; `cut`: SIGTERM to rank 1 while it draws or learns this step."""
    draw = Sampler.draw

    def asked(self: Sampler, step: int, progress: Any) -> Any:
        if cut is not None and step <= cut < step + self.config.updates_per_batch and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return draw(self, step, progress)

    with prepared(exactly), patch.object(Sampler, "draw", asked):
        try:
            return rl.run(build(RLConfig, given), out).stage
        except KeyboardInterrupt:
            return "interrupted"


def left(folder: Path) -> tuple[list[dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """Metrics that must be equal, and the stored samples."""
    skipped = ("tokens", "grad_norm_seconds", "imbalance", "rank_imbalance")  # which count padding, or depend on ranks
    rows = artifact.Metrics(folder / "metrics.jsonl").read()
    kept = [
        {k: v for k, v in row.items() if not k.endswith("seconds") and not k.startswith("sent/") and k not in skipped}
        for row in rows
    ]
    return kept, {file.name: pq.read_table(file).to_pylist() for file in sorted(folder.glob("data/*.parquet"))}


def assert_same(found: Path, expected: Path) -> None:
    rows, samples = left(found)
    calm_rows, calm_samples = left(expected)
    assert samples == calm_samples
    assert len(rows) == len(calm_rows)
    for row, calm in zip(rows, calm_rows, strict=True):
        assert row == pytest.approx(calm, rel=1e-9, abs=1e-12)
    ours, theirs = (hf.load(folder / "model", torch.float32).state_dict() for folder in (found, expected))
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6) for name in theirs)


def test_four_ranks_write_judge_and_learn_as_one_and_a_cut_run_goes_on_in_one(
    experts: dict[str, Any], tmp_path: Path
) -> None:
    """Cut on four ranks while a batch of rollouts is half learnt, gone on with in one process."""
    given = settings(experts, DEGREES, **SHARED)
    assert run(4, train, given, tmp_path / "cut", CUT) == ["interrupted"] * 4
    steps = [row["step"] for row in artifact.Metrics(tmp_path / "cut" / "metrics.jsonl").read() if "loss" in row]
    assert steps == list(range(1, CUT + 1))
    alone = {**given, "parallel": {}}
    assert train(alone, tmp_path / "cut") == train(alone, tmp_path / "calm") == "rl"
    assert_same(tmp_path / "cut", tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {},
    SHARED,
    {"max_gen_batches": 3, "aggregation": "group_token_mean", "advantage_scale": "none"},
    {"aggregation": "seq_mean_token_mean", "loop": {"micro_batch_size": 4}, "correction": {"kind": "seq_trunc"}},
])  # fmt: skip
@pytest.mark.parametrize("degrees", [
    DEGREES, {"zero": 3}, {"tensor": 2, "context": 2, "expert": 4}, {"pipeline": 2, "expert": 2},
])  # fmt: skip
def test_all_mappings_and_settings(
    experts: dict[str, Any], tmp_path: Path, changes: dict[str, Any], degrees: dict[str, Any]
) -> None:
    """From the start, and gone on with from what one process has begun."""
    given = settings(experts, degrees, **changes)
    alone = {**given, "parallel": {}}
    assert train(alone, tmp_path / "calm") == "rl"
    assert run(4, train, given, tmp_path / "four") == ["rl"] * 4
    assert_same(tmp_path / "four", tmp_path / "calm")


def stopped(given: dict[str, Any], out: Path, sick: int, how: str) -> str:
    """How the stage ends where the engine of one rank does not take new weights, or says that it did not."""
    sync = Engine.sync

    def deaf(self: Engine, weights: Any = None) -> None:
        if how == "stale":
            self._batch.weight_version += 1
        for _ in weights:
            pass

    rank = int(os.environ["RANK"])
    with prepared(exactly=False), patch.object(Engine, "sync", deaf if rank == sick else sync):
        try:
            rl.run(build(RLConfig, given), out)
        except BloomeryError as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(("how", "says"), [("stale", "not from the policy being trained"), ("old", "weight version: ")])
def test_one_rank_with_other_weights_stops_all(experts: dict[str, Any], tmp_path: Path, how: str, says: str) -> None:
    given = settings(experts, DEGREES, tripwires={"max_logprob_gap": 1e-3}, loop={"learning_rate": 3e-2})
    found = run(4, stopped, given, tmp_path / "out", 2, how)
    assert all(one.startswith("DivergenceError") and says in one for one in found), found
    taken = [row["step"] for row in artifact.Metrics(tmp_path / "out" / "metrics.jsonl").read() if "loss" in row]
    assert taken == ([1] if how == "stale" else [])  # at first the weights were still equal
    assert (tmp_path / "out" / "data" / f"rollouts-{len(taken) + 1:05d}.parquet").exists()  # what it stopped for


def completion(tokens: int, score: bool) -> Sample:
    prompt = Prompt("p", "s", [], "1", "answer", tuple(range(2, 2 + tokens)))
    verdict = Verdict.of("correct" if score else "wrong")
    return Sample(prompt, Completion(list(range(3, 3 + tokens)), [-3.0] * tokens, "stop", 0, ""), verdict)


def batches(pad: int = 0) -> list[Batch]:
    """One step: of three groups one teaches nothing, and rows are 1 to 9 positions long."""
    scores = [[True, False, True], [False, False, False], [True, True, False]]
    groups = [[completion(1 + 2 * i + j // 2, score) for j, score in enumerate(row)] for i, row in enumerate(scores)]
    return micro_batches(Rollouts(groups), 99, pad, "token_mean", 8)


def test_balancing_weighs_what_is_learnt_and_padding_is_not_counted(experts: dict[str, Any]) -> None:
    """The term is a mean over the learnt completions, whatever share of the step's tokens they are."""
    model = hf.load(Path(experts["model"]), torch.float32).train()
    losses = []
    for weight in (0.0, 0.5):
        balance.install(model, BalanceConfig(kind="sequence", weight=weight))
        [batch] = batches()
        losses.append(PolicyGradient(1.0, 99.0)(model, batch))
    value, labels = losses[0].metrics["balance"]
    tokens, labels_learnt = 30, 20  # of the step; without those of the group of equal rewards
    assert float(losses[0].weight) == tokens
    assert int((batch["labels"] != IGNORE).sum()) == labels_learnt
    expected = 0.5 * tokens * float(value / labels)
    assert (losses[1].sum - losses[0].sum).item() == pytest.approx(expected, rel=1e-4)
    [padded] = batches(pad=7)
    assert not torch.equal(padded["input_ids"], batch["input_ids"])
    again = PolicyGradient(1.0, 99.0)(model, padded).metrics["balance"]
    assert float(again[0] / again[1]) == pytest.approx(float(value / labels), rel=1e-5)


def learnt(batch: Batch) -> list[tuple[list[int], float]]:
    """What of each row with labels is learnt, and with which advantage."""
    rows = zip(batch["labels"], batch["advantages"].tolist(), strict=True)
    return [(row[row != IGNORE].tolist(), advantage) for row, advantage in rows if (row != IGNORE).any()]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_micro_batches_are_dealt_whole_and_once(ranks: int) -> None:
    [batch] = batches()
    dealt = [_dealt([batch], place, ranks) for place in range(ranks)]
    assert len({len(own) for own in dealt}) == 1  # ranks meet once for each
    everything = [each for own in dealt for each in own]
    assert sum(float(each["loss_weight"]) for each in everything) == float(batch["loss_weight"])
    assert sorted(pair for each in everything for pair in learnt(each)) == sorted(learnt(batch))
    idle = [each for each in everything if not (each["labels"] != IGNORE).any()]
    assert len(idle) == max(0, ranks - 6)
    assert all(not each["counted"].any() and not each["loss_weight"].any() for each in idle)


def test_halves_are_as_long_as_their_rows() -> None:
    first, second = _halves(batches()[0])
    assert [len(half["labels"]) for half in (first, second)] == [3, 3]
    for half in (first, second):
        assert half["counted"].sum(-1).max() == half["input_ids"].shape[1] == half["generator_logprobs"].shape[1]


def test_settings_that_would_have_no_effect_or_split_the_policy_are_refused(
    experts: dict[str, Any], tiny_world: Any, tmp_path: Path
) -> None:
    dropping = settings(experts, {}, loop={"balance": {"capacity_factor": 1.0}})
    with pytest.raises(ConfigError, match=r"loop.balance.capacity_factor: the generator drops no token"):
        build(RLConfig, dropping)
    dense = {**settings(experts, {}), "model": tiny_world.model, "prompts": tiny_world.prompts}
    with pytest.raises(ConfigError, match="balance: without effect, the model has no layer with experts"):
        rl.run(build(RLConfig, dense), tmp_path / "out")


def test_check_knows_the_degrees(experts: dict[str, Any], tmp_path: Path) -> None:
    found = rl.check(build(RLConfig, settings(experts, DEGREES)))
    assert found["mapping"].startswith("tensor 2, expert 2")
    assert found["rank_copy_bytes"] == 4 * hf.load_config(Path(experts["model"])).count_parameters()
    with pytest.raises(ConfigError, match="n_routed_experts 4; choose 1, 2 or 4"):
        rl.check(build(RLConfig, settings(experts, {"expert": 8})))
    later = settings({**experts, "model": str(tmp_path / "later")}, {"data": 5})
    with pytest.raises(ConfigError, match="batch_size: 24 does not divide into 5 data ranks"):
        rl.check(build(RLConfig, later))
    vllm = settings(experts, DEGREES, generator={"type": "vllm"})
    assert run(4, refused, vllm, tmp_path / "out") == ["generator.type: vllm here runs in one process only"] * 4


def refused(given: dict[str, Any], out: Path) -> str:
    """The first words of what the stage says."""
    with prepared(exactly=False):
        try:
            rl.run(build(RLConfig, given), out)
        except ConfigError as error:
            return str(error).partition(";")[0]
    return ""
