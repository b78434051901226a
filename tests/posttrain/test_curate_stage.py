"""Stage `curate`: prompts in, fewer prompts out, and the manifest says why."""

import json
import re
from pathlib import Path

import pytest

from bloomery import config as configs
from bloomery.data.dataset import read_rows, write_rows
from bloomery.errors import ArtifactError, ConfigError
from bloomery.posttrain import curation
from bloomery.posttrain.curation import CurateConfig

PAGE = Path(__file__).parents[2] / "docs" / "verify.md"


def settings(**values) -> CurateConfig:
    return configs.build(CurateConfig, {key: str(v) if isinstance(v, Path) else v for key, v in values.items()})


@pytest.fixture
def prompts(tmp_path) -> Path:
    questions = {"easy": ("sum of 2 and 3", "5"), "hard": ("sum of 1 and 1", "2"), "never": ("sum of 4 and 4", "8")}
    questions["damaged"] = ("sum of 1 and 8", "19")
    for source, ids in {"a": ("easy", "hard"), "b": ("never", "damaged")}.items():
        rows = [
            {
                "prompt": [{"role": "user", "content": questions[id][0]}], "answer": questions[id][1],
                "verifier": "answer", "id": id, "metadata": json.dumps({"from": source}),
            }
            for id in ids
        ]  # fmt: skip
        write_rows(tmp_path / "prompts", source, rows, "prompts")
    echo = {"prompt": [{"role": "user", "content": "Simplify $\\sqrt{192}$"}], "answer": "8\\sqrt{3}", "id": "echo"}
    write_rows(tmp_path / "prompts", "c", [echo | {"verifier": "answer"}], "prompts")
    return tmp_path / "prompts"


@pytest.fixture
def rollouts(tmp_path) -> Path:
    scores = {"easy": [1, 1, 1, 1], "hard": [1, 1, 0, None], "never": [0, 0], "damaged": [0, 0, 1]}
    answers = {"easy": "5 5 5 5", "hard": "2 2 3 9", "never": "7 9", "damaged": "9 9 19"}
    rows = [
        {"id": id, "completion": rf"\boxed{{{text}}}", "answer": "", "score": score}
        for id, group in scores.items()
        for score, text in zip(group, answers[id].split(), strict=True)
    ]
    file = tmp_path / "rollouts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_prompts_are_left_out_for_counted_reasons(prompts, rollouts, tmp_path):
    config = settings(prompts=prompts, rollouts=rollouts, solvable=True, above=0, at_most=0.9)
    manifest = curation.run(config, tmp_path / "out")
    assert manifest.kind == "prompts"
    assert manifest.summary["dropped"] == {
        "pass rate above 0.9": 1, "pass rate at most 0": 1, "majority vote is another answer": 1,
        "answered by its own question": 1,
    }  # fmt: skip
    [row] = read_rows(tmp_path / "out", "prompts")
    assert (row["id"], row["source"], row["answer"], row["metadata"]) == ("hard", "a", "2", '{"from": "a"}')
    assert row["prompt"] == [{"role": "user", "content": "sum of 1 and 1"}]
    assert curation.run(config, tmp_path / "out") == manifest


def test_without_rollouts_only_the_gold_is_judged(prompts, tmp_path):
    manifest = curation.run(settings(prompts=prompts), tmp_path / "out")
    assert manifest.summary == {"prompts": 4, "dropped": {"answered by its own question": 1}}
    assert curation.run(settings(prompts=prompts, verifiable=False), tmp_path / "all").summary["prompts"] == 5


def test_bad_settings_are_explained(prompts, rollouts, tmp_path):
    with pytest.raises(ConfigError, match="rollouts: missing"):
        curation.check(settings(prompts=prompts, at_most=0.5))
    with pytest.raises(ConfigError, match="above: 0.5 is not below"):
        curation.check(settings(prompts=prompts, rollouts=rollouts, above=0.5, at_most=0.5))
    rollouts.write_text("".join(
        json.dumps({"id": id, "completion": "", "answer": "", "score": 0}) + "\n"
        for id in ("easy", "hard", "never", "damaged", "echo")
    ))  # fmt: skip
    with pytest.raises(ArtifactError, match="no prompt is left; dropped: 5 pass rate at most 0"):
        curation.run(settings(prompts=prompts, rollouts=rollouts, above=0), tmp_path / "out")


def test_the_settings_on_the_page_are_accepted():
    [block] = re.findall(r"```yaml\n# stage: curate\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert curation.check(configs.build(CurateConfig, configs.parse_yaml(block))) == {"kind": "prompts"}


def test_what_is_solved_in_few_tokens_is_left_out(prompts, rollouts, tmp_path):
    rows = [json.loads(line) for line in rollouts.read_text().splitlines()]
    with pytest.raises(ArtifactError, match="no column 'tokens'"):
        curation.run(settings(prompts=prompts, rollouts=rollouts, min_tokens=10), tmp_path / "lost")
    lengths = {"easy": 4, "hard": 15, "never": 3, "damaged": 12}
    longer = tmp_path / "longer.jsonl"
    longer.write_text("".join(json.dumps(row | {"tokens": lengths[row["id"]]}) + "\n" for row in rows))
    manifest = curation.run(
        settings(prompts=prompts, rollouts=longer, min_tokens=10, verifiable=False), tmp_path / "out"
    )
    assert manifest.summary["dropped"] == {"solved in under 10 tokens": 1}
    assert {row["id"] for row in read_rows(tmp_path / "out", "prompts")} == {"hard", "never", "damaged", "echo"}
