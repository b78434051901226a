import os
import signal
import sys
import time
import types

import pytest

from bloomery import artifact, recipe
from bloomery.artifact import Output
from bloomery.config import Config, DatasetDir, Field
from bloomery.errors import ArtifactError, BloomeryError, ConfigError


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
