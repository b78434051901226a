"""The stage end to end on a tiny model, and its scoring on answers written by hand."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bloomery import artifact
from bloomery.config import build
from bloomery.data.dataset import write_rows
from bloomery.data.prompts import Prompt
from bloomery.errors import ArtifactError, BloomeryError, ConfigError
from bloomery.evaluate import evaluate, scoring
from bloomery.evaluate.evaluate import EvaluateConfig
from bloomery.evaluate.scoring import Answer
from bloomery.generate import Completion
from bloomery.verify import judge


def config(world: Any, **settings: Any) -> EvaluateConfig:
    defaults = {"num_samples": 2, "max_new_tokens": 8, "max_problems": 6, "seed": 3, "workers": 1}
    return build(EvaluateConfig, {"model": world.model, "prompts": world.prompts, **defaults, **settings})


def test_report_and_samples(tiny_world: Any, tmp_path: Path) -> None:
    manifest = evaluate.run(config(tiny_world), tmp_path / "out")
    assert manifest.kind == "evaluation"
    rows = artifact.read_json(tmp_path / "out" / "report.json")
    unless_wrong = {"tokens_per_correct", "tokens_when_right", "tokens_wrong_over_right"}  # where nothing is correct
    names = {row["metric"] for row in rows} - unless_wrong
    budgets = {"avg_within_quarter", "avg_within_half"}
    lengths = {"tokens_per_answer", "tokens_when_wrong", "truncated"}
    assert names == {"avg@2", "pass@2", "maj@2", "format"} | budgets | lengths
    assert all(row.keys() == {"task", "version", "metric", "value", "stderr", "n"} for row in rows)
    assert {(row["task"], row["n"]) for row in rows} == {("sums", 6)}
    samples = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    assert len(samples) == 12 == manifest.summary["samples"]
    assert manifest.summary["unjudged"] == 0
    assert sum(manifest.summary["statuses"].values()) == 12
    assert len({row["completion"] for row in samples}) > 6  # samples of one problem differ


def test_the_same_settings_write_the_same_files(tiny_world: Any, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        evaluate.run(config(tiny_world, max_batch=64 if name == "one" else 3), tmp_path / name)
        digests.append([artifact.file_digest(tmp_path / name / file) for file in ("report.json", "samples.parquet")])
    assert digests[0] == digests[1]


def test_a_finished_evaluation_is_not_repeated(tiny_world: Any, tmp_path: Path) -> None:
    evaluate.run(config(tiny_world), tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    evaluate.run(config(tiny_world), tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_smaller_evaluation_is_a_part_of_a_larger_one(tiny_world: Any, tmp_path: Path) -> None:
    evaluate.run(config(tiny_world, max_problems=None), tmp_path / "all")
    evaluate.run(config(tiny_world), tmp_path / "few")
    every, few = (pq.read_table(tmp_path / name / "samples.parquet").to_pylist() for name in ("all", "few"))
    texts = {(row["id"], row["sample"]): row["completion"] for row in every}
    assert all(texts[row["id"], row["sample"]] == row["completion"] for row in few)


def test_check_says_what_will_happen(tiny_world: Any, tmp_path: Path) -> None:
    found = evaluate.check(config(tiny_world))
    assert (found["problems"], found["samples"], found["left_out"]) == (6, 12, "none")
    missing = evaluate.check(config(tiny_world).model_copy(update={"model": tmp_path / "later"}))
    assert "no such folder" in missing["inputs"]


def test_bad_settings(tiny_world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="temperature: 0 writes the same answer each time"):
        config(tiny_world, temperature=0)
    with pytest.raises(ConfigError, match="64 leaves no room for a prompt in the model's context of 64"):
        evaluate.run(config(tiny_world, max_new_tokens=64), tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"no prompt is left to use; dropped: 25 prompt longer than 2 tokens"):
        evaluate.run(config(tiny_world, max_new_tokens=62), tmp_path / "b")


def test_a_prompt_without_answer_is_refused(tiny_world: Any, tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "1+1="}], "answer": "", "verifier": "answer", "id": "x"}
    write_rows(tmp_path / "prompts", "sums", [row], "prompts")
    with pytest.raises(ArtifactError, match="prompt x has no answer"):
        evaluate.run(config(tiny_world, prompts=tmp_path / "prompts"), tmp_path / "out")


def answers(source: str, name: str, texts: Sequence[str | None], gold: str = "7") -> list[Answer]:
    """Answers of one problem; None stands for one that could not be judged."""
    prompt = Prompt(name, source, [], gold, "answer", (1,))
    found = []
    for number, text in enumerate(texts):
        verdict = judge("answer", text or "", gold)
        if text is None:
            verdict = dataclasses.replace(verdict, score=None, status="infra_error", reason="the worker died")
        found.append(Answer(prompt, number, Completion([1] * 10, None, "stop", 0, text or ""), verdict))
    return found


def test_unjudged_answers_are_left_out_and_never_zero() -> None:
    found = scoring.metrics([answers("s", "a", [r"\boxed{7}", None]), answers("s", "b", [None, None])])
    assert found["avg@1"].value == 1.0
    assert found["avg@1"].n == 1
    assert found["tokens_per_answer"].value == 10
    assert found["tokens_per_correct"].value == 40


def test_wrong_answers_vote_by_value_and_unreadable_ones_not_at_all() -> None:
    problem = answers("s", "a", [r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", r"\boxed{7}", "seven", r"\boxed{8"])
    assert [a.vote is None for a in problem] == [False, False, False, True, True]
    assert problem[0].vote == problem[1].vote != problem[2].vote
    found = scoring.metrics([problem])
    assert found["maj@5"].value == 0.0  # two halves against one seven
    assert found["pass@5"].value == 1.0


def test_right_answers_agree_whatever_their_form() -> None:
    problem = answers("s", "a", [r"\boxed{7}", r"\boxed{7.0}", r"\boxed{8}"])
    assert scoring.metrics([problem])["maj@3"].value == 1.0


def test_several_sources_are_reported_together_and_apart() -> None:
    rows = scoring.report_rows([answers("s", "a", [r"\boxed{7}"]), answers("t", "b", [r"\boxed{1}"])])
    values = {(row["task"], row["metric"]): row["value"] for row in rows}
    assert (values["all", "avg@1"], values["s", "avg@1"], values["t", "avg@1"]) == (0.5, 1.0, 0.0)
    assert ("t", "tokens_per_correct") not in values  # nothing correct: undefined, not infinite


def test_no_verdict_at_all_is_an_error() -> None:
    with pytest.raises(BloomeryError, match="judge none of 2 answers; the first reason: the worker died"):
        evaluate._require_verdicts([answers("s", "a", [None, None])])
