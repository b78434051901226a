"""The stage end to end on a tiny model: reward rises, a kill changes nothing, and what would mislead stops the run."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from bloomery import artifact
from bloomery import config as configs
from bloomery.config import build
from bloomery.data.document import Drops
from bloomery.data.prompts import Prompt
from bloomery.errors import ArtifactError, BloomeryError, ConfigError, DivergenceError
from bloomery.generate import Completion, Engine, Request
from bloomery.model import hf
from bloomery.model.decoder import Decoder
from bloomery.posttrain import generators, rl
from bloomery.posttrain.rl_config import RLConfig
from bloomery.posttrain.rollouts import Rollouts, Sample
from bloomery.posttrain.sampler import Sampler, winnable
from bloomery.posttrain.tripwires import require_judged
from bloomery.verify import VERIFIERS, Pool, Verdict


def starts_with_digit(completion: str, gold: str, require_think: bool = False) -> Verdict:
    """A task that an untrained model can learn in a few steps: write a digit first."""
    return Verdict.of("correct" if completion[:1].isdigit() or completion.startswith("\\boxed") else "wrong")


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERIFIERS, "answer", starts_with_digit)
    monkeypatch.setattr(rl, "self_test", lambda verifiers: None)


def config(world: Any, **settings: Any) -> RLConfig:
    loop = {"max_steps": 6, "learning_rate": 2e-2, "schedule": "constant", "checkpoint_every_steps": 2}
    loop |= {"micro_batch_size": 16} | settings.pop("loop", {})
    defaults = {"num_prompts": 4, "group_size": 8, "max_new_tokens": 3, "seed": 1, "store_every_steps": 4, "loop": loop}
    return build(RLConfig, {"model": world.model, "prompts": world.prompts, "workers": 1, **defaults, **settings})


def rows(folder: Path) -> list[dict[str, Any]]:
    return artifact.Metrics(folder / "metrics.jsonl").read()


def column(folder: Path, name: str) -> list[float]:
    return [row[name] for row in rows(folder) if name in row]


@pytest.mark.usefixtures("digits")
def test_reward_rises_on_policy(tiny_world: Any, tmp_path: Path) -> None:
    manifest = rl.run(config(tiny_world, loop={"max_steps": 12}), tmp_path / "out")
    accuracy = column(tmp_path / "out", "accuracy")
    assert len(accuracy) == 12
    assert sum(accuracy[-4:]) > sum(accuracy[:4]) + 1
    assert max(column(tmp_path / "out", "logprob_gap_max")) < 1e-4
    assert manifest.kind == "model"
    assert manifest.summary["accuracy_last"] > manifest.summary["accuracy_first"]
    assert manifest.summary["prompts"] == 25
    names = {"accuracy", "reward", "groups_all_wrong", "groups_all_right", "completion_tokens", "truncated", "entropy",
             "grad_norm", "logprob_gap", "generator_kl", "redrawn"}  # fmt: skip
    assert names <= rows(tmp_path / "out")[0].keys()
    assert hf.load(artifact.resolve(tmp_path / "out", "model")).config.vocab_size > 256


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.usefixtures("digits")
def test_killed_and_rerun_gives_the_same_run(tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rl.run(config(tiny_world), tmp_path / "calm")
    original = rl.resumable

    def dying(*args: Any, **kwargs: Any) -> Any:
        for step in original(*args, **kwargs):
            yield step
            if step.step == 5:
                raise Killed

    monkeypatch.setattr(rl, "resumable", dying)
    with pytest.raises(Killed):
        rl.run(config(tiny_world), tmp_path / "killed")
    monkeypatch.setattr(rl, "resumable", original)
    rl.run(config(tiny_world), tmp_path / "killed")
    calm, killed = (rows(tmp_path / name) for name in ("calm", "killed"))
    assert timeless(calm) == timeless(killed)
    for name in ("rollouts-00004.parquet", "rollouts-00006.parquet"):
        digests = [artifact.file_digest(tmp_path / run / "data" / name) for run in ("calm", "killed")]
        assert digests[0] == digests[1]
    weights = [hf.load(tmp_path / run / "model").state_dict() for run in ("calm", "killed")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.usefixtures("digits")
def test_stored_rollouts_and_a_reference(tiny_world: Any, tmp_path: Path) -> None:
    rl.run(config(tiny_world, kl=0.1, loop={"max_steps": 2}), tmp_path / "out")
    stored = pq.read_table(tmp_path / "out" / "data" / "rollouts-00002.parquet").to_pylist()
    assert len(stored) == 32
    assert {(row["step"], row["sample"]) for row in stored} == {(2, j) for j in range(8)}
    assert column(tmp_path / "out", "reference_kl")[0] == pytest.approx(0.0, abs=1e-6)  # still the same model
    assert column(tmp_path / "out", "reference_kl")[1] > 0


def test_no_signal_is_passed_over_and_then_an_error(tiny_world: Any, tmp_path: Path) -> None:
    """The untrained model never writes a box, so every group is all wrong."""
    with pytest.raises(DivergenceError, match=r"in 3 draws of 4 prompts no group had .* last: 0%"):
        rl.run(config(tiny_world, max_redraws=2), tmp_path / "out")
    assert not rows(tmp_path / "out")


@pytest.mark.usefixtures("digits")
def test_draws_without_signal_take_no_step(tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced, honest = iter([False, False]), Sampler._worth_learning
    monkeypatch.setattr(Sampler, "_worth_learning", lambda *args: honest(*args) if next(forced, True) else [])
    rl.run(config(tiny_world, num_prompts=8, loop={"max_steps": 2}), tmp_path / "out")
    assert column(tmp_path / "out", "redrawn") == [2, 0]
    assert column(tmp_path / "out", "step") == [1, 1, 2, 2]


class Stale(Engine):
    """Generates from the weights it was made with, and does not know it."""

    def __init__(self, model: Decoder, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self.old = Engine(copy.deepcopy(model), *args, **kwargs)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        return self.old.stream(requests)

    def sync(self, weights: Any = None) -> None:
        super().sync()
        self.old.sync()


class Deaf(Stale):
    """The same, and its completions say so."""

    def sync(self, weights: Any = None) -> None:
        Engine.sync(self)


@pytest.mark.usefixtures("digits")
def test_stale_weights_in_the_generator_stop_the_run(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generators, "Engine", Stale)
    with pytest.raises(DivergenceError, match="not from the policy being trained"):
        rl.run(config(tiny_world, tripwires={"max_logprob_gap": 1e-3}), tmp_path / "out")
    assert len(column(tmp_path / "out", "loss")) == 1  # the first step was on-policy: the weights were still equal
    monkeypatch.setattr(generators, "Engine", Deaf)
    with pytest.raises(DivergenceError, match="weight version: completions of version 0, the generator was given ver"):
        rl.run(config(tiny_world), tmp_path / "deaf")
    assert (tmp_path / "deaf" / "data" / "rollouts-00001.parquet").exists()  # what it stopped for


def test_a_broken_verifier_is_not_a_zero() -> None:
    prompt = Prompt("p", "s", [], "1", "answer", (1,))
    verdicts = [Verdict.of("correct"), Verdict.of("infra_error", "the worker died"), Verdict.of("wrong")]
    samples = [Sample(prompt, Completion([1], [-1.0], "stop", 0, ""), verdict) for verdict in verdicts]
    rollouts = Rollouts([samples])
    assert rollouts.metrics()["accuracy"] == 0.5
    assert rollouts.metrics()["status/infra_error"] == pytest.approx(1 / 3)
    require_judged(rollouts, 0.4)
    with pytest.raises(BloomeryError, match="could not judge 1 of 3 completions .* the worker died"):
        require_judged(rollouts, 0.3)


def test_prompts_that_cannot_be_won_are_left_out() -> None:
    good, bad = (Prompt(answer, "s", [], answer, "answer", (1,)) for answer in ("12", "{"))
    drops = Drops()
    with Pool(1) as pool:
        assert winnable([good, bad], pool, False, drops) == [good]
        assert winnable([good], pool, True, drops) == [good]
        with pytest.raises(ArtifactError, match="no prompt is left to train on; dropped: 2 its own answer is judged"):
            winnable([bad], pool, False, drops)


def test_bad_settings(tiny_world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="group_size: .* greater than or equal to 2"):
        config(tiny_world, group_size=1)
    with pytest.raises(ConfigError, match="temperature: .* greater than 0"):
        config(tiny_world, temperature=0)
    with pytest.raises(ConfigError, match="group_size / updates_per_batch = 32 completions; leave batch_size out"):
        config(tiny_world, loop={"batch_size": 64})
    with pytest.raises(ConfigError, match="max_new_tokens: 64 leaves no room"):
        rl.run(config(tiny_world, max_new_tokens=64), tmp_path / "a")
    with pytest.raises(ArtifactError, match="no prompt is left to use; dropped: 25 prompt longer than 3 tokens"):
        rl.run(config(tiny_world, max_new_tokens=61), tmp_path / "b")


def test_the_resolved_config_reads_back(tiny_world: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(configs.dump(config(tiny_world)))
    assert configs.load(RLConfig, tmp_path / "config.yaml") == config(tiny_world)
    assert config(tiny_world).loop.batch_size == 32


def test_check_says_what_will_happen(tiny_world: Any, tmp_path: Path) -> None:
    found = rl.check(config(tiny_world))
    assert (found["prompts"], found["samples_per_step"], found["left_out"]) == (25, 32, "none")
    assert found["first_prompt"].endswith("<|assistant|>")
    later = config(tiny_world).model_copy(update={"prompts": tmp_path / "later"})
    assert "no such folder" in rl.check(later)["inputs"]
