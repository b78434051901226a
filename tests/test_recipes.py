import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from bloomery import artifact, recipe
from bloomery.artifact import Output
from bloomery.config import Config, DatasetDir, Field
from bloomery.errors import ArtifactError, BloomeryError, ConfigError

CHECKOUT = Path(__file__).parent.parent


class ToyConfig(Config):
    data: DatasetDir | None = Field(default=None, description="input")
    act: str = Field(default="finish", description="what the toy does")
    seed: int = Field(default=0, description="seed")


def run_toy(config, out):
    with Output(out, "toy", config) as output:
        (out / "runs").open("a").write("x")
        if config.act == "refuse":
            raise ArtifactError("the toy broke; buy another")
        if config.act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.act == "wait":
            time.sleep(30)
        return output.finish("documents", {"loss": 0.25})


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    module = types.ModuleType("toy_stage")
    module.ToyConfig, module.run, module.check = ToyConfig, run_toy, lambda config: {"tokens": 3}
    monkeypatch.setitem(sys.modules, "toy_stage", module)
    monkeypatch.setitem(recipe.STAGES, "toy", ("toy_stage", "ToyConfig"))


def load(tmp_path, text, *overrides):
    (tmp_path / "r.yaml").write_text(text)
    return recipe.load(tmp_path / "r.yaml", overrides, tmp_path / "run")


CHAIN = """
seed: 7
stages:
  last: {stage: toy, data: "@first"}
  first: {stage: toy, seed: 3}
"""


def test_order_follows_references_and_seeds_fill_in(tmp_path):
    folder, steps = load(tmp_path, CHAIN)
    assert [(step.name, step.config.seed) for step in steps] == [("first", 3), ("last", 7)]
    assert steps[1].config.data == folder / "first"


def test_overrides_name_the_stage(tmp_path):
    _, steps = load(tmp_path, CHAIN, "last.act=die", "seed=9")
    assert (steps[1].config.act, steps[1].config.seed) == ("die", 9)
    with pytest.raises(ConfigError, match="'lost' is no stage of this recipe; did you mean last"):
        load(tmp_path, CHAIN, "lost.act=die")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {a: {stage: toi}}", "'toi' is no stage; did you mean toy?"),
        ('stages: {a: {stage: toy, data: "@b"}}', "@b: 'b' is no stage of this recipe"),
        ('stages: {a: {stage: toy, data: "@b"}, b: {stage: toy, data: "@a"}}', "wait for one another"),
        ("stages: {a: {stage: toy, sed: 1}}", "a.sed: unknown key; did you mean seed?"),
        ("stage: {}", "'stage' is no recipe key; did you mean stages?"),
        ("seed: 1", "expected a mapping of names to stages"),
        ("stages: {a: 3}", "stages.a: found 3, expected settings"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert message in str(error.value)


def test_finished_stages_are_skipped(tmp_path):
    folder, steps = load(tmp_path, CHAIN)
    first = recipe.run(folder, steps)
    again = recipe.run(folder, steps)
    assert first == again
    assert (folder / "last" / "runs").read_text() == "x"


def test_a_stage_error_crosses_the_process_with_its_type_and_name(tmp_path):
    folder, steps = load(tmp_path, CHAIN, "last.act=refuse")
    with pytest.raises(ArtifactError, match="last: the toy broke; buy another"):
        recipe.run(folder, steps)
    assert artifact.read_manifest(folder / "first") is not None


def test_a_killed_stage_is_reported_and_resumable(tmp_path):
    folder, steps = load(tmp_path, CHAIN, "last.act=die")
    with pytest.raises(BloomeryError, match="by signal 9.*Run the same command to resume"):
        recipe.run(folder, steps)


def test_a_stage_dies_with_its_parent(tmp_path):
    folder, steps = load(tmp_path, "stages: {a: {stage: toy, act: wait}}")
    parent = os.fork()
    if parent == 0:
        recipe.run(folder, steps)
        os._exit(0)
    deadline = time.monotonic() + 10
    while not (folder / "a" / "runs").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while time.monotonic() < deadline:
        try:
            with Output(folder / "a", "toy", steps[0].config):
                return  # the lock is free: nobody writes any more
        except ArtifactError:
            time.sleep(0.05)
    pytest.fail("the stage went on without its parent")


def test_check_asks_each_stage_and_says_what_it_waits_for(tmp_path):
    _, steps = load(tmp_path, CHAIN)
    assert recipe.check(steps) == {
        "first": {"stage": "toy", "tokens": 3},
        "last": {"stage": "toy", "tokens": 3, "inputs": "more is known once first has run"},
    }


def test_check_refuses_an_input_that_nobody_makes(tmp_path):
    _, steps = load(tmp_path, f"stages: {{a: {{stage: toy, data: {tmp_path}/lost}}}}")
    with pytest.raises(ArtifactError, match=r"a.data: .*lost: no such folder"):
        recipe.check(steps)


def test_what_a_recipe_needs_from_outside_is_told_by_check_and_asked_for_by_run(tmp_path):
    lost = tmp_path / "lost"
    text = f"needs: {{{lost}: fetch it}}\nstages: {{a: {{stage: toy}}, b: {{stage: toy, data: {lost}}}}}"
    folder, steps = load(tmp_path, text)
    assert recipe.check(steps)["b"]["inputs"] == f"more is known once {lost} is there (fetch it)"
    assert "inputs" not in recipe.check(steps)["a"]
    with pytest.raises(ArtifactError, match=r"b: runs once .*lost is there \(fetch it\)"):
        recipe.run(folder, steps)
    assert artifact.read_manifest(folder / "a") is not None, "what can run before it does"
    with pytest.raises(ConfigError, match="needs: found"):
        load(tmp_path, "needs: [a]\nstages: {a: {stage: toy}}")


def test_acereason_7b_is_the_papers_course_and_needs_no_data_to_be_checked():
    _, steps = recipe.load(CHECKOUT / "recipes" / "acereason-7b.yaml")
    found = recipe.check(steps)
    assert "hf download deepseek-ai/DeepSeek-R1-Distill-Qwen-7B" in found["math-8k"]["inputs"]
    course = [
        (step.name, max(phase.max_new_tokens for phase in step.config.samplings()), step.config.loop.learning_rate)
        for step in steps
        if step.stage == "rl"
    ]
    assert course == [
        ("math-8k", 8192, 1e-6), ("math-16k", 16384, 1e-6), ("math-24k", 24576, 1e-6),
        ("code-24k", 24000, 5e-6), ("code-32k", 32768, 5e-6), ("math-32k", 32768, 1e-6),
    ]  # fmt: skip
    models = {step.name: step.config.model.name for step in steps if step.stage == "rl"}
    assert list(models.values())[1:] == [name for name, _, _ in course][:-1], "each stage goes on from the one before"
    assert {(step.config.num_prompts, step.config.updates_per_batch, step.config.kl) for step in steps
            if step.stage == "rl"} == {(128, 1, 0.0)}  # fmt: skip


def test_crossthink_7b_has_the_papers_settings_and_needs_no_data_to_be_checked():
    _, steps = recipe.load(CHECKOUT / "recipes" / "crossthink-7b.yaml")
    found = recipe.check(steps)
    assert "hf download Qwen/Qwen2.5-7B" in found["rl"]["inputs"]
    both = {step.name: step.config for step in steps if step.stage == "rl"}
    assert {name: config.blend.shares for name, config in both.items()} == {
        "rl": {"gpr": 2, "math": 1}, "rl-math": {"math": 1},
    }  # fmt: skip
    one = both["rl"]
    blendless = [config.model_copy(update={"blend": None}) for config in both.values()]
    assert blendless[0] == blendless[1], "they differ in the blend alone"
    assert (one.num_prompts, one.group_size, one.updates_per_batch, one.kl, one.temperature) == (128, 8, 1, 0.001, 1.0)
    assert (one.loop.learning_rate, one.loop.max_steps) == (1e-6, 650)
    assert one.max_prompt_tokens + one.max_new_tokens == 5000
    assert (one.reward.combine, one.require_think) == ("and", True)
