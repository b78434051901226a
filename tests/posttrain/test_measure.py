"""The difficulty filter: a model's samples, by the engine or an endpoint, and prompts chosen by them."""

import json
from pathlib import Path
from typing import Any

import pytest
from rl_kills import starts_with_digit
from test_generators import Endpoint, serving

from bloomery import config as configs
from bloomery.data.dataset import read_rows, write_rows
from bloomery.data.document import Document, Drops
from bloomery.errors import ConfigError
from bloomery.posttrain import curation, measure
from bloomery.posttrain.audit import stored_rows
from bloomery.posttrain.curate import PassRate, by_difficulty, one_wording, pass_rates
from bloomery.posttrain.curation import CurateConfig
from bloomery.verify import VERIFIERS


def settings(world: Any, **values: Any) -> CurateConfig:
    sampled = {"model": str(world.model), "samples": 2, "max_new_tokens": 3, "workers": 1} | values.pop("measure", {})
    return configs.build(
        CurateConfig, {"prompts": str(world.prompts), "verifiable": False, "measure": sampled, **values}
    )


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model has some right answers: those that begin with a digit."""
    monkeypatch.setitem(VERIFIERS, "answer", starts_with_digit)
    monkeypatch.setattr(measure, "self_test", lambda verifiers: None)


@pytest.mark.usefixtures("digits")
def test_what_a_model_solves_is_left_out_by_engine_and_endpoint_alike(tiny_world: Any, tmp_path: Path) -> None:
    asked = settings(tiny_world, at_most=0.0)
    manifest = curation.run(asked, tmp_path / "engine")
    rows = list(stored_rows(tmp_path / "engine" / curation.MEASURED))
    solved = {id for id, rate in pass_rates(rows).items() if rate.right}
    assert len(rows) == 50
    assert 0 < len(solved) < 25
    assert manifest.summary["dropped"] == {"pass rate above 0": len(solved)}
    assert {row["id"] for row in read_rows(tmp_path / "engine", "prompts")}.isdisjoint(solved)
    with serving(Endpoint(tiny_world.model)) as url:
        endpoint = {"endpoint": {"base_url": url, "model": "m", "concurrency": 2}}
        curation.run(settings(tiny_world, at_most=0.0, measure=endpoint), tmp_path / "endpoint")
    again = stored_rows(tmp_path / "endpoint" / curation.MEASURED)
    assert [row["completion"] for row in again] == [row["completion"] for row in rows]


@pytest.mark.usefixtures("digits")
def test_samples_that_are_there_are_not_written_again(tiny_world: Any, tmp_path: Path, monkeypatch) -> None:
    config = settings(tiny_world).measure
    assert config is not None
    monkeypatch.setattr(measure, "_PROMPTS_PER_FILE", 20)
    measure.measure(config, tiny_world.prompts, tmp_path, Drops())
    first, second = sorted(tmp_path.glob("*.parquet"))
    second.unlink()
    before = first.stat().st_mtime_ns
    measure.measure(config, tiny_world.prompts, tmp_path, Drops())
    assert first.stat().st_mtime_ns == before
    assert len(list(stored_rows(tmp_path))) == 50


def choice(id: str, options: int = 4) -> Document:
    metadata = {"item": id, "form": "choice", "options": list("wxyz")[:options], "question": "?"}
    return Document("", id, "quiz", metadata, {"prompt": [], "answer": "A", "verifier": "label"})


def test_right_choices_that_guessing_explains_count_as_none():
    """Of 8 tries with 4 options P(X ≥ 4) = 0.114 and P(X ≥ 5) = 0.027; with 2 options P(X ≥ 6) = 0.145."""
    rates = {f"r{right}": PassRate(right, 8) for right in (0, 3, 4, 5, 8)}
    documents = [choice(id) for id in rates]
    kept = [document.id for document in by_difficulty(documents, rates, Drops(), at_most=0.25)]
    assert kept == ["r0", "r3", "r4"]
    solvable = [document.id for document in by_difficulty(documents, rates, Drops(), above=0)]
    assert solvable == ["r5", "r8"]
    assert list(by_difficulty([choice("r5", 2)], rates, Drops(), above=0)) == []
    opened = Document("", "r3", "quiz", {"form": "open", "options": ["x"]}, {"verifier": "short"})
    assert list(by_difficulty([opened], rates, Drops(), above=0)) == [opened]
    assert [d.id for d in by_difficulty(documents, rates, Drops(), above=0, guessed=0.12)] == ["r4", "r5", "r8"]


def test_answers_that_could_be_worded_otherwise_must_have_been_given():
    def opened(id: str) -> Document:
        return Document("", id, metadata={"transforms": [{"form": "open", "ambiguous": True}]})

    plain = Document("", "plain", metadata={"transforms": [{"shuffled": [0, 1]}]})
    documents = [opened("twice"), opened("once"), opened("never asked"), plain]
    drops = Drops()
    rates = {"twice": PassRate(2, 8), "once": PassRate(1, 8)}
    assert [document.id for document in one_wording(documents, rates, drops, 2)] == ["twice", "plain"]
    assert drops.counts == {
        "could be worded otherwise, given fewer than 2 times": 1, "could be worded otherwise, not tried": 1,
    }  # fmt: skip
    assert [document.id for document in one_wording(documents, None, Drops(), 2)] == ["plain"]


def test_kept_questions_know_how_hard_they_are(tmp_path: Path):
    row = choice("q").columns | {"prompt": [{"role": "user", "content": "?"}], "id": "q", "source": "quiz"}
    write_rows(tmp_path / "prompts", "quiz", [row | {"metadata": json.dumps(dict(choice("q").metadata))}], "prompts")
    file = tmp_path / "rollouts.jsonl"
    rollouts = [{"id": "q", "completion": "", "answer": "A", "score": score} for score in (1, 1, 1, 1, 0, 0, 0, 0)]
    file.write_text("".join(json.dumps(rollout) + "\n" for rollout in rollouts))
    config = configs.build(
        CurateConfig,
        {"prompts": str(tmp_path / "prompts"), "rollouts": str(file), "at_most": 0.4, "verifiable": False},
    )
    curation.run(config, tmp_path / "out")
    [kept] = read_rows(tmp_path / "out", "prompts")
    found = json.loads(kept["metadata"])
    assert (found["difficulty"], found["n_pass"], found["n_try"], found["judge_model"]) == (0.5, 4, 8, str(file))


def test_two_sources_of_rates_are_refused(tiny_world: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match="measure: has no effect beside rollouts"):
        curation.check(settings(tiny_world, rollouts=str(tmp_path)))
