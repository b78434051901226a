"""The stage with its options on, on a tiny model: what each changes in the run as a whole."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rl_kills import starts_with_digit

from bloomery import artifact
from bloomery.config import build
from bloomery.data.dataset import read_rows, write_rows
from bloomery.errors import BloomeryError, ConfigError, DivergenceError, SandboxError
from bloomery.model import hf
from bloomery.posttrain import audit, rl
from bloomery.posttrain.rl_config import RLConfig
from bloomery.posttrain.sampler import Sampler
from bloomery.verify import VERIFIERS, Verdict


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERIFIERS, "answer", starts_with_digit)
    monkeypatch.setattr(rl, "self_test", lambda verifiers: None)


def config(world: Any, **settings: Any) -> RLConfig:
    loop = {"max_steps": 4, "learning_rate": 2e-2, "schedule": "constant", "micro_batch_size": 8}
    loop |= settings.pop("loop", {})
    defaults = {"num_prompts": 4, "group_size": 8, "max_new_tokens": 3, "seed": 1, "loop": loop, "workers": 1}
    return build(RLConfig, {"model": world.model, "prompts": world.prompts, **defaults, **settings})


def rows(folder: Path) -> list[dict[str, Any]]:
    return artifact.Metrics(folder / "metrics.jsonl").read()


def column(folder: Path, name: str) -> list[float]:
    return [row[name] for row in rows(folder) if name in row]


def test_a_length_curriculum(tiny_world: Any, tmp_path: Path) -> None:
    phases = [{"until_step": 2, "max_new_tokens": 2, "group_size": 4, "temperature": 0.7}, {"at_most": 0.9}]
    rl.run(config(tiny_world, phases=phases, store_every_steps=1), tmp_path / "out")
    assert column(tmp_path / "out", "max_new_tokens") == [2, 2, 3, 3]
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in read_rows(tmp_path / "out" / "data", "traces"):
        by_step.setdefault(row["step"], []).append(row)
    assert {step: len(found) for step, found in by_step.items()} == {1: 16, 2: 16, 3: 32, 4: 32}
    assert [max(row["tokens"] for row in found) for found in by_step.values()] == [2, 2, 3, 3]
    assert max(column(tmp_path / "out", "logprob_gap_max")) < 1e-4  # the temperature of each phase on both sides


def test_stored_rollouts_are_traces_that_can_be_audited(tiny_world: Any, tmp_path: Path) -> None:
    rl.run(config(tiny_world, loop={"max_steps": 1}), tmp_path / "out")
    [row, *_] = read_rows(tmp_path / "out" / "data", "traces")
    assert (row["verifier"], row["step"], row["sample"]) == ("answer", 1, 0)
    cases = list(audit.stored_cases(tmp_path / "out" / "data", {}))
    assert len(cases) == 32
    assert all(case.right == starts_with_digit(case.completion, "").correct for case in cases)


def test_solved_prompts_leave_and_the_stage_ends_with_the_last(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "prompts", "one", list(read_rows(tiny_world.prompts, "prompts"))[:6], "prompts")
    settings = {"prompts": tmp_path / "prompts", "num_prompts": 2, "drop_solved": 0.1, "loop": {"max_steps": 50}}
    settings["tripwires"] = {"max_repeated": 1.0}
    manifest = rl.run(config(tiny_world, **settings), tmp_path / "out")
    left = column(tmp_path / "out", "prompts_left")
    assert manifest.summary["all_solved"]
    assert len(column(tmp_path / "out", "loss")) < 50
    assert left == sorted(left, reverse=True)
    assert max(left) < 6
    assert hf.load(artifact.resolve(tmp_path / "out", "model"))


def test_a_difficulty_range_by_an_earlier_evaluation(tiny_world: Any, tmp_path: Path) -> None:
    known = [{"id": f"sum-{n}", "completion": "", "answer": "", "score": float(n % 5 == 0)} for n in range(25)]
    (tmp_path / "rates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    phases = [{"at_most": 0.5}]
    rl.run(config(tiny_world, phases=phases, rollouts=tmp_path / "rates.jsonl", loop={"max_steps": 1}), tmp_path / "o")
    assert column(tmp_path / "o", "prompts_left") == [20]


def test_dynamic_sampling_fills_the_batch_with_groups_that_teach(tiny_world: Any, tmp_path: Path) -> None:
    plain, filled = (
        config(
            tiny_world, group_size=2, max_gen_batches=most, loop={"max_steps": 2}, store_every_steps=1,
            tripwires={"max_truncated": 1.0, "max_degenerate": 1.0},
        )
        for most in (1, 40)
    )  # fmt: skip
    rl.run(plain, tmp_path / "plain")
    rl.run(filled, tmp_path / "filled")
    assert any(share > 0 for share in column(tmp_path / "plain", "groups_all_wrong"))
    assert column(tmp_path / "filled", "groups_missing") == [0, 0]
    assert max(column(tmp_path / "filled", "redrawn")) > 0
    for step in (1, 2):
        stored = pq.read_table(tmp_path / "filled" / "data" / f"rollouts-{step:05d}.parquet").to_pylist()
        scores = [[row["score"] for row in stored[first : first + 2]] for first in range(0, 8, 2)]
        assert [sorted(pair) for pair in scores] == [[0.0, 1.0]] * 4
    assert column(tmp_path / "filled", "accuracy")[0] < 0.5  # of all that was sampled, not of what was chosen


def test_at_the_cap_it_learns_from_what_there_is(tiny_world: Any, tmp_path: Path) -> None:
    rl.run(config(tiny_world, group_size=2, max_gen_batches=2, loop={"max_steps": 2}), tmp_path / "out")
    assert all(0 <= missing < 4 for missing in column(tmp_path / "out", "groups_missing"))
    assert sum(column(tmp_path / "out", "groups_missing")) > 0


class Killed(Exception):
    """Stands for the end of the process."""


def test_several_updates_share_a_batch_and_a_cut_run_goes_on_in_the_middle(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates 1 and 2 learn from the first batch, 3 and 4 from the second; cut behind update 3."""
    settings = {"updates_per_batch": 2, "clip": {"low": 0.2, "high": 0.28}, "kl": 0.01, "correction": {}}
    settings["loop"] = {"checkpoint_every_steps": 1}
    rl.run(config(tiny_world, **settings), tmp_path / "calm")
    accuracy = [("accuracy" in row) for row in rows(tmp_path / "calm") if "loss" in row]
    assert accuracy == [True, False, True, False]
    assert column(tmp_path / "calm", "clipped")[0] == 0  # the first update is on-policy
    original = rl.resumable

    def dying(*args: Any, **kwargs: Any) -> Any:
        for step in original(*args, **kwargs):
            yield step
            if step.step == 4:
                raise Killed

    monkeypatch.setattr(rl, "resumable", dying)
    with pytest.raises(Killed):
        rl.run(config(tiny_world, **settings), tmp_path / "cut")
    monkeypatch.setattr(rl, "resumable", original)
    drawn: list[int] = []
    draw = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", lambda self, step, extra: drawn.append(step) or draw(self, step, extra))
    rl.run(config(tiny_world, **settings), tmp_path / "cut")
    assert not drawn
    weights = [hf.load(tmp_path / run / "model").state_dict() for run in ("calm", "cut")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_verifier_that_breaks_in_the_middle_stops_the_run(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected: from the second step on everything scores 0, or the verifier raises. Nothing is learnt from it."""
    asked = iter(range(10_000))

    def zero(completion: str, gold: str, require_think: bool = False) -> Verdict:
        if next(asked) > 60:
            return Verdict.of("wrong")
        return starts_with_digit(completion, gold)

    monkeypatch.setitem(VERIFIERS, "answer", zero)
    with pytest.raises(BloomeryError, match=r"the gold answer of prompt sum-\d+, as wrong .* its rewards mean nothing"):
        rl.run(config(tiny_world), tmp_path / "zero")
    assert len(column(tmp_path / "zero", "loss")) == 1

    def buggy(completion: str, gold: str, require_think: bool = False) -> Verdict:
        raise KeyError("a bug in the verifier")

    monkeypatch.setitem(VERIFIERS, "answer", buggy)
    with pytest.raises(KeyError, match="a bug in the verifier"):
        rl.run(config(tiny_world, check_answers=False, tripwires={"canaries": 0}), tmp_path / "buggy")
    assert not column(tmp_path / "buggy", "loss")
    monkeypatch.setitem(VERIFIERS, "answer", starts_with_digit)
    rl.run(config(tiny_world), tmp_path / "zero")  # repaired, the same command goes on


def test_tripwires_stop_and_leave_what_they_saw(tiny_world: Any, tmp_path: Path) -> None:
    limits = {"window": 2, "min_entropy": 50.0, "max_truncated": 1.0}
    with pytest.raises(DivergenceError, match="entropy: .* over the last 2 steps"):
        rl.run(config(tiny_world, tripwires=limits), tmp_path / "entropy")
    with pytest.raises(DivergenceError, match="truncated: 100% of the completions are cut off"):
        rl.run(config(tiny_world, tripwires={"window": 1, "max_truncated": 0.5}), tmp_path / "cut")
    assert (tmp_path / "cut" / "data" / "rollouts-00001.parquet").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": {}}, "clip: without effect with one update per batch"),
        ({"updates_per_batch": 2}, "moves the policy away from its samples; say how far by clip"),
        (
            {"updates_per_batch": 3, "clip": {}, "loop": {"batch_size": 8}},
            "updates_per_batch: 3 does not divide num_prompts 4",
        ),
        (
            {"phases": [{"max_new_tokens": 2}, {"max_new_tokens": 3}]},
            r"phases.0.until_step: None, expected a step above",
        ),
        ({"phases": [{"until_step": 2}, {"until_step": 3}]}, r"phases.1.until_step: 3, but the run has 4 steps"),
        ({"phases": [{"until_step": 2}, {"until_step": 2}]}, r"phases.1.until_step: 2, expected a step above 2"),
        ({"phases": [{"above": 0.5, "at_most": 0.5}]}, r"phases.0.above: 0.5 is not below at_most 0.5"),
        ({"rollouts": "somewhere"}, "rollouts: without effect, no phase asks for pass rates"),
        ({"overlong": {"penalty_tokens": 9}}, "overlong.penalty_tokens: 9 is more than max_new_tokens"),
        ({"correction": {"low": 3}}, "correction: low 3 is not below high 2"),
        ({"generator": {"type": "endpoint", "model": "m", "server": "vllm"}}, "generator.*base_url: missing"),
    ],
)
def test_settings_that_contradict_each_other(tiny_world: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tiny_world, **settings)


def test_check_names_the_phases(tiny_world: Any) -> None:
    found = rl.check(config(tiny_world, phases=[{"until_step": 2, "max_new_tokens": 2}, {}]))
    assert [phase["max_new_tokens"] for phase in found["phases"]] == [2, 3]


def test_without_a_sandbox_programs_are_not_judged(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bubblewrap on the path: the stage is refused with the line that installs it, and nothing is learnt."""
    tests = {
        "kind": "call",
        "fn_name": "f",
        "cases": [{"args": [1], "ret": 1}],
        "reference": "def f(x):\n    return x\n",
    }
    chats = [{"prompt": [{"role": "user", "content": f"{n}="}], "answer": json.dumps(tests), "verifier": "program"}
             for n in range(4)]  # fmt: skip
    write_rows(tmp_path / "prompts", "code", chats, "prompts")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="bwrap is not installed, .* apt-get install bubblewrap"):
        rl.run(config(tiny_world, prompts=tmp_path / "prompts"), tmp_path / "out")
    assert not rows(tmp_path / "out")
