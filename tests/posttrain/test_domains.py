"""Several domains in one run: metrics and loss weights worked out by hand, tripwires provoked, a blend that holds."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bloomery import artifact
from bloomery.config import build
from bloomery.data.dataset import read_rows, write_rows
from bloomery.data.prompt_blend import PromptBlend
from bloomery.data.prompts import Prompt
from bloomery.errors import ConfigError, DivergenceError
from bloomery.generate import Completion
from bloomery.posttrain import rl
from bloomery.posttrain.batches import gradient_shares, micro_batches
from bloomery.posttrain.domains import DomainWatch, Wanted, domain_metrics, entropy
from bloomery.posttrain.rl_config import RLConfig
from bloomery.posttrain.rollouts import Group, Rollouts, Sample
from bloomery.verify import VERIFIERS, Reward, Verdict, judge


def asked(domain: str, number: int = 0, options: int = 0, answer: str = "1", verifier: str = "answer") -> Prompt:
    return Prompt(f"{domain}{number}", "s", [], answer, verifier, (number,), domain, "open", options)


def group(prompt: Prompt, texts: Sequence[str], tokens: int = 2, reward: Reward | None = None) -> list[Sample]:
    """Judged as in a run; each completion has so many tokens."""
    return [
        Sample.of(
            prompt, Completion([1] * tokens, [-1.0] * tokens, "stop", 1, text),
            judge(prompt.verifier, text, prompt.answer), reward, False,
        )
        for text in texts
    ]  # fmt: skip


RIGHT, WRONG, SPOILT = r"\boxed{1}", r"\boxed{2}", r"\boxed{1} \boxed{1}"


def test_metrics_of_each_domain_by_hand() -> None:
    label = asked("law", 1, options=4, answer="B", verifier="label")
    words = asked("text", 2, answer="Charlemagne", verifier="short")
    groups: list[Group] = [
        group(asked("math"), [RIGHT, WRONG, SPOILT, RIGHT], reward=Reward()),
        group(label, [r"\boxed{B}", r"\boxed{A}"] * 2, reward=Reward()),
        group(asked("law", 3, options=4, answer="B", verifier="label"), [r"\boxed{B}"] * 4, reward=Reward()),
        group(words, [r"\boxed{Charlemange}", "", "", ""], reward=Reward()),
    ]
    found = domain_metrics(Rollouts(groups))
    assert found["accuracy/math"] == 0.75
    assert found["format/math"] == 0.75
    assert found["reward/math"] == 0.5
    assert found["format"] == (3 + 4 + 4 + 1) / 16
    assert found["accuracy_malformed"] == 1 / 4
    assert found["accuracy/law"] == 0.75
    assert found["beyond_chance/law"] == 0.5
    assert "beyond_chance/math" not in found
    assert found["near_miss/text"] == 0.25
    assert [found[f"degenerate/{name}"] for name in ("law", "math", "text")] == [0.5, 0.0, 1.0]
    assert [found[f"share/{name}"] for name in ("law", "math", "text")] == [0.5, 0.25, 0.25]
    assert [found[f"active_share/{name}"] for name in ("law", "math", "text")] == [0.5, 0.5, 0.0]
    assert not [name for name in domain_metrics(Rollouts(groups[:1])) if "/" in name], "one domain is the whole"


def test_what_is_paid_is_learnt_and_what_is_right_is_counted() -> None:
    [samples] = groups = [group(asked("math"), [RIGHT, SPOILT], reward=Reward())]
    rollouts = Rollouts(groups)
    assert rollouts.rewards.tolist() == [[1.0, 0.0]]
    assert not rollouts.degenerate.any()
    assert rollouts.metrics() | {"accuracy": 1.0, "reward": 0.5} == rollouts.metrics()
    assert samples[1].paid == Verdict(0.0, "multi_box", "right, but its form: 2 boxes, expected 1")
    plain = Rollouts([group(asked("math"), [RIGHT, SPOILT])])
    assert plain.degenerate.all(), "without a reward of its own the verdict is paid"
    assert domain_metrics(plain)["format"] == 0.5


LONG = [group(asked("math", 0), [RIGHT, WRONG], 6), group(asked("law", 1), [RIGHT, WRONG], 2),
        group(asked("law", 2), [RIGHT, RIGHT], 2)]  # fmt: skip


def test_long_answers_rule_the_token_mean_and_not_the_balanced_loss() -> None:
    """|A| = 1/√2 in both groups with signal: 12 tokens of math against 4 of law."""
    rollouts = Rollouts(LONG)
    assert gradient_shares(rollouts, "token_mean", 8) == pytest.approx({"math": 0.75, "law": 0.25}, abs=1e-5)
    # math: share 1/3 over 12 tokens; law: 2/3 over 8, of which 4 have a signal
    expected = {"math": 1 / 3, "law": 2 / 3 * 4 / 8}
    balanced = gradient_shares(rollouts, "domain_balanced", 8)
    assert balanced == pytest.approx({"math": 0.5, "law": 0.5}, abs=1e-5)
    assert expected["math"] == expected["law"]
    weights = {
        (row, tokens): weight
        for batch in micro_batches(rollouts, 8, 0, "domain_balanced", 8)
        for row, (tokens, weight) in enumerate(
            zip((batch["labels"] >= 0).sum(-1).tolist(), batch["row_weights"].tolist(), strict=True)
        )
    }
    assert {tokens: round(weight, 6) for (_, tokens), weight in weights.items()} == {
        6: round(1 / 36, 6), 2: round(2 / 24, 6)
    }  # fmt: skip
    batches = micro_batches(rollouts, 1, 0, "domain_balanced", 8)
    assert sum(batch["loss_weight"].item() for batch in batches) == pytest.approx(1.0), "shares add up to 1"


def test_the_balanced_loss_leaves_out_a_domain_without_tokens() -> None:
    unjudged = [Sample(s.prompt, s.completion, Verdict.of("infra_error")) for s in LONG[0]]
    batches = micro_batches(Rollouts([unjudged, *LONG[1:]]), 8, 0, "domain_balanced", 8)
    assert sum(batch["loss_weight"].item() for batch in batches) == pytest.approx(1.0)


def config(world: Any, **settings: Any) -> RLConfig:
    loop = {"max_steps": 3, "learning_rate": 2e-2, "schedule": "constant", "micro_batch_size": 12}
    loop |= settings.pop("loop", {})
    defaults = {"num_prompts": 6, "group_size": 2, "max_new_tokens": 3, "seed": 1, "loop": loop, "workers": 1}
    return build(RLConfig, {"model": world.model, "prompts": world.prompts, **defaults, **settings})


def watched(world: Any, steps: Sequence[Sequence[Group]], **settings: Any) -> None:
    watch, progress = DomainWatch(config(world, tripwires={"window": 2}, **settings)), dict[str, Any]()
    for groups in steps:
        watch.see(Rollouts(groups), progress)
        progress = json.loads(json.dumps(progress))  # as in a checkpoint


def test_a_domain_that_goes_wrong_stops_the_run(tiny_world: Any) -> None:
    good = group(asked("math"), [RIGHT, WRONG])
    flat = group(asked("law", 1), [RIGHT, RIGHT])
    watched(tiny_world, [[good, flat], [good, good]])
    watched(tiny_world, [[flat], [flat], [flat]])  # one domain: the run's own tripwires watch it
    with pytest.raises(DivergenceError, match=r"domain law: 100% of the groups have equal rewards over the last 2"):
        watched(tiny_world, [[good, flat], [good, flat]])
    cut = [Sample(s.prompt, Completion([1], [-1.0], "length", 1, ""), s.verdict) for s in good]
    with pytest.raises(DivergenceError, match=r"domain math: 100% of the completions are cut off .* raise max_new_tok"):
        watched(tiny_world, [[cut, group(asked("law", 1), [RIGHT, WRONG])]] * 2)
    formless = [group(asked("law", 1), ["1", "2"], reward=Reward()), group(asked("math"), [RIGHT, WRONG])]
    mixed = [Sample(s.prompt, s.completion, s.verdict, s.form, Verdict.of("correct" if i else "wrong"))
             for i, s in enumerate(formless[0])]  # fmt: skip
    with pytest.raises(DivergenceError, match=r"domain law: 0.0% of the completions have the form .* by SFT on a few"):
        watched(tiny_world, [[mixed, formless[1]]] * 2, reward={})
    watched(tiny_world, [[mixed, formless[1]]] * 2)  # nobody asked for the form


def test_a_policy_that_answers_by_habit_is_stopped(tiny_world: Any) -> None:
    def asks(said: str) -> list[Group]:
        labels = [asked("law", number, 4, "ABCD"[number % 4], "label") for number in range(16)]
        return [group(prompt, [rf"\boxed{{{said[place % len(said)]}}}", r"\boxed{A}"])
                for place, prompt in enumerate(labels)] + [group(asked("math"), [RIGHT, WRONG])]  # fmt: skip

    watched(tiny_world, [asks("ABCD")] * 4)
    limits = {"window": 4, "domains": {"max_degenerate": 1.0}}
    message = r"domain law: 100% of the labels chosen over the last 4 draws are A; their entropy is 0.00 of an even"
    watch, progress = DomainWatch(config(tiny_world, tripwires=limits)), dict[str, Any]()
    for _ in range(3):
        watch.see(Rollouts(asks("A")), progress)
    with pytest.raises(DivergenceError, match=message):
        watch.see(Rollouts(asks("A")), progress)
    assert entropy({"A": 1, "B": 1}) == pytest.approx(0.6931, abs=1e-4)


def test_each_part_of_a_blend_gets_its_groups() -> None:
    def drawn(*domains: str) -> Rollouts:
        return Rollouts([group(asked(name, number), [RIGHT, WRONG]) for number, name in enumerate(domains)])

    first, wanted = drawn("math", "math", "law", "law"), Wanted(4, PromptBlend(shares={"math": 1, "law": 1}))
    assert wanted.parts is None
    wanted.add(first, first.groups[:2])  # law had no signal
    assert wanted.missing == {"law": 2}
    assert wanted.parts == ["law"]
    second = drawn("law", "law", "law")
    wanted.add(second, second.groups)
    assert not wanted.missing
    assert [each[0].prompt.domain for each in wanted.kept] == ["math", "math", "law", "law"]


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learnable by an untrained model; of the domain `law` hardly a group has a signal."""

    def first(completion: str, gold: str, require_think: bool = False) -> Verdict:
        lucky = completion[:1].isdigit() if gold == "7" else completion[:1].isalnum()
        return Verdict.of("correct" if lucky or completion.startswith("\\boxed") else "wrong")

    monkeypatch.setitem(VERIFIERS, "answer", first)
    monkeypatch.setattr(rl, "self_test", lambda verifiers: None)


@pytest.mark.usefixtures("digits")
def test_a_run_keeps_its_blend_among_what_is_learnt(tiny_world: Any, tmp_path: Path) -> None:
    rows = [
        row | {"metadata": json.dumps({"domain": "law" if i % 2 else "math"}), "answer": "7" if i % 2 else "8"}
        for i, row in enumerate(read_rows(tiny_world.prompts, "prompts"))
    ]
    write_rows(tmp_path / "prompts", "s", rows, "prompts")
    settings = {
        "loop": {"max_steps": 2, "micro_batch_size": 24}, "prompts": tmp_path / "prompts", "max_gen_batches": 60,
        "blend": {"shares": {"math": 2, "law": 1}},
        "store_every_steps": 1, "aggregation": "domain_balanced", "group_size": 4,
        "tripwires": {"max_repeated": 1.0, "domains": {"max_degenerate": 1.0, "max_truncated": 1.0}},
    }  # fmt: skip
    rl.run(config(tiny_world, **settings, blend_on_active=True), tmp_path / "held")
    domains = {row["id"]: json.loads(row["metadata"])["domain"] for row in rows}
    for step in (1, 2):
        stored = [row for row in read_rows(tmp_path / "held" / "data", "traces") if row["step"] == step]
        assert Counter(domains[row["id"]] for row in stored) == {"math": 16, "law": 8}
    logged = artifact.Metrics(tmp_path / "held" / "metrics.jsonl").read()[0]
    assert logged["learnt_share/math"] == pytest.approx(2 / 3)
    assert logged["share/law"] > 1 / 2, "drawn again and again"
    assert {"accuracy/law", "gradient_share/math", "active_share/law", "format", "degenerate/law"} <= logged.keys()


def test_settings_without_effect_or_without_form(tiny_world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="blend_on_active: without effect without a blend and max_gen"):
        config(tiny_world, blend_on_active=True, max_gen_batches=4)
    found = rl.check(config(tiny_world, max_prompt_tokens=2))
    assert "no prompt is left to use; dropped: 25 prompt longer than 2 tokens" in found["inputs"]
    tests = {"kind": "call", "fn_name": "f", "cases": [{"args": [1], "ret": 1}]}
    rows = [{"prompt": [{"role": "user", "content": "f"}], "answer": json.dumps(tests), "verifier": "program"}]
    write_rows(tmp_path / "prompts", "code", rows, "prompts")
    with pytest.raises(ConfigError, match=r"reward.combine: and asks for one box .* prompt 0 is judged by program"):
        rl.run(config(tiny_world, prompts=tmp_path / "prompts", reward={}), tmp_path / "out")
