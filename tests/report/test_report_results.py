"""The before/after table against numbers worked out by hand."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from life_on_disk import LifeOnDisk

from bloomery.errors import ArtifactError
from bloomery.evaluate.statistics import Difference
from bloomery.report.results import evaluations, headlines, results_table, tables
from bloomery.report.run import read_run
from bloomery.report.samples import problems


def write(life, name, model, rows, scores):
    """An evaluation with given report rows and `scores[id]`, a list of samples each."""
    folder = life.stage(name, "evaluate", "evaluation", [model])
    (folder / "report.json").write_text(json.dumps(rows))
    samples = [
        {"task": "sums", "id": item, "source": "s", "prompt": "1+1", "completion": f"{name} {sample}", "answer": "2",
         "score": score, "status": "s", "reason": "r", "tokens": 10 * (sample + 1), "finish_reason": "stop",
         "sample": sample}
        for item, each in scores.items() for sample, score in enumerate(each)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(samples), folder / "samples.parquet")


def report(metric, value, stderr=0.05, n=4):
    return {"task": "sums", "version": 1, "metric": metric, "value": value, "stderr": stderr, "n": n}


@pytest.fixture
def life(tmp_path):
    life = LifeOnDisk(tmp_path / "run")
    life.stage("sft", "sft", "model")
    life.stage("rl", "rl", "model", ["sft"])
    # Evaluated in the other order, so that the order of the models must come from their lineage.
    rows = [report("avg@2", 0.875), report("pass@2", 1.0, 0.0), report("tokens_per_answer", 15.0, 1.0)]
    write(life, "after", "rl", rows,
          {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 0.0], "d": [1.0, 1.0]})  # fmt: skip
    write(life, "before", "sft", [report("avg@2", 0.25), report("pass@2", 0.5)],
          {"a": [1.0, 0.0], "b": [0.0, 0.0], "c": [0.0, 0.0], "d": [0.0, 1.0]})  # fmt: skip
    return life


def test_models_stand_in_the_order_of_their_life(life):
    (table,) = tables(evaluations(read_run(life.path)))
    assert [row.model for row in table.rows] == ["sft", "rl"]
    assert table.metrics == ("avg@2", "pass@2", "tokens_per_answer")


def test_cells_hold_value_interval_and_paired_change(life):
    (table,) = tables(evaluations(read_run(life.path)))
    before, after = (dict(zip(table.metrics, row.cells, strict=True)) for row in table.rows)
    assert before["tokens_per_answer"] is None
    assert before["avg@2"].change is None
    assert before["avg@2"].text == "25.0\N{NARROW NO-BREAK SPACE}%"
    assert before["avg@2"].interval == "15.2 – 34.8"  # 25 ± 1.96 · 5
    # by problem: a 0.5→1, b 0→1, c 0→0.5, d 0.5→1: mean +0.625
    assert after["avg@2"].change.effect == pytest.approx(0.625)
    assert after["avg@2"].change.n == 4
    assert after["avg@2"].direction == "better"
    # pass@2: a 1→1, b 0→1, c 0→1, d 1→1: mean +0.5
    assert after["pass@2"].change.effect == pytest.approx(0.5)
    assert after["tokens_per_answer"].change.effect == 0.0
    assert after["tokens_per_answer"].text == "15"


def test_a_share_stays_between_zero_and_one(life):
    write(life, "edge", "rl", [report("avg@2", 0.98, 0.1)], {"a": [1.0, 1.0]})
    (table,) = tables(evaluations(read_run(life.path)))
    assert table.rows[-1].cells[0].high == 1.0


def test_the_headline_spans_the_whole_life(life):
    (headline,) = headlines(evaluations(read_run(life.path)))
    assert headline.models == ("sft", "rl")
    assert headline.last.change.effect == pytest.approx(0.625)


def test_unjudged_samples_count_neither_way(tmp_path):
    life = LifeOnDisk(tmp_path / "run")
    life.stage("sft", "sft", "model")
    life.stage("rl", "rl", "model", ["sft"])
    write(life, "one", "sft", [report("avg@2", 0.5)], {"a": [1.0, None], "b": [None, None]})
    write(life, "two", "rl", [report("avg@2", 1.0)], {"a": [1.0, 1.0], "b": [1.0, 1.0]})
    (table,) = tables(evaluations(read_run(life.path)))
    assert table.rows[1].cells[0].change.effect == 0.0
    assert table.rows[1].cells[0].change.n == 1


def test_plain_text_for_a_terminal(life):
    lines = results_table(life.path).splitlines()
    assert lines[0].split() == ["sums", "avg@2", "change", "pass@2", "tokens"]
    assert lines[2].startswith("rl")
    assert "+62.5 (" in lines[2]
    assert len({len(line) for line in lines[1:]}) <= 2


def test_no_evaluation_gives_no_text(tmp_path):
    life = LifeOnDisk(tmp_path / "run")
    life.stage("corpora", "prepare", "documents")
    assert results_table(life.path) == ""


def test_a_malformed_report_names_its_file(life):
    (life.path / "after" / "report.json").write_text('{"avg": 1}')
    with pytest.raises(ArtifactError, match=r"after/report\.json: expected a list of \{task, metric"):
        results_table(life.path)


def test_samples_show_every_outcome_and_the_same_problem_across_models(life):
    write(life, "third", "rl", [report("avg@2", 0.5)], {"a": [None, 1.0], "e": [0.0, 1.0]})
    shown = {problem.id: problem for problem in problems(evaluations(read_run(life.path)))}
    assert [answer.outcome for answer in shown["a"].answers] == ["right", "right", "unjudged"]
    assert [answer.completion for answer in shown["c"].answers] == ["before 0", "after 0"]
    assert {answer.outcome for answer in shown["e"].answers} == {"wrong"}


def test_the_task_over_all_sources_is_paired_too(tmp_path):
    life = LifeOnDisk(tmp_path / "run")
    for model, scores in (("sft", [0.0, 1.0]), ("rl", [1.0, 1.0])):
        life.stage(model, "sft", "model", ["sft"] if model == "rl" else [])
        folder = life.stage(f"eval-{model}", "evaluate", "evaluation", [model])
        rows = [report("avg@1", sum(scores) / 2) | {"task": task} for task in ("all", "sums", "facts")]
        (folder / "report.json").write_text(json.dumps(rows))
        samples = [
            {"task": task, "id": "0", "score": score, "tokens": 5}
            for task, score in zip(("sums", "facts"), scores, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(samples), folder / "samples.parquet")
    (table, *_) = tables(evaluations(read_run(life.path)))
    change = table.rows[1].cells[0].change
    assert (table.task, change.effect, change.n) == ("all", 0.5, 2)


def test_each_family_leads_with_its_largest_k(life):
    metrics = ["avg@4", "pass@2", "pass@4", "maj@2", "maj@4", "tokens_per_answer", "truncated"]
    write(life, "many", "rl", [report(metric, 0.5) for metric in metrics], {"a": [1.0]})
    (table,) = tables([each for each in evaluations(read_run(life.path)) if each.stage.name == "many"])
    assert [table.metrics[index] for index in table.leading] == ["avg@4", "pass@4", "maj@4", "tokens_per_answer"]
    assert [table.metrics[index] for index in table.others] == ["pass@2", "maj@2", "truncated"]


def test_only_a_metric_with_a_good_side_is_better_or_worse(life):
    (table,) = tables(evaluations(read_run(life.path)))
    cell = table.rows[1].cells[0]
    assert cell.direction == "better"
    assert dataclasses.replace(cell, metric="truncated").direction == "moved"
    assert dataclasses.replace(cell, change=Difference(-0.2, -0.3, -0.1, 4)).direction == "worse"
    assert dataclasses.replace(cell, change=Difference(0.2, -0.1, 0.3, 4)).direction == "same"
