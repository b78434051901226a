"""Tokens and right answers on the page, against numbers worked out by hand."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from life_on_disk import LifeOnDisk, whole_life

from bloomery import artifact
from bloomery.report.efficiency import comparisons
from bloomery.report.report import write_report
from bloomery.report.results import evaluations
from bloomery.report.run import read_run


def evaluation(life: LifeOnDisk, model: str, answers: dict[str, list[tuple[float | None, int]]]) -> None:
    folder = life.stage(f"eval-{model}", "evaluate", "evaluation", [model], config="max_new_tokens: 60\n")
    artifact.write_json(folder / "report.json", [])
    rows = [{"task": "sums", "id": item, "score": score, "tokens": tokens}
            for item, samples in answers.items() for score, tokens in samples]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")


def test_models_are_compared_on_what_both_solve(tmp_path):
    life = LifeOnDisk(tmp_path / "run")
    life.stage("sft", "sft", "model")
    life.stage("rl", "rl", "model", ["sft"])
    evaluation(life, "sft", {"a": [(1.0, 10)], "b": [(0.0, 30)], "c": [(1.0, 40)]})
    evaluation(life, "rl", {"a": [(1.0, 20)], "b": [(1.0, 60)], "c": [(None, 3)]})
    [compared] = comparisons(evaluations(read_run(life.path)))
    before, after = compared.table.rows
    assert before[0] == "sft"
    assert before[1].startswith("25 (")  # (10 + 40) / 2
    assert before[2].startswith("40 (")  # 80 / 2
    assert before[3].startswith("1.2 (")  # 30 / 25
    assert [cell.replace("\N{NARROW NO-BREAK SPACE}", "") for cell in before[4:]] == ["33.3%", "33.3%", "66.7%", "–"]
    assert after[-1] == "× 2.00, 1 item"
    line = dict(zip(compared.picture.traces[1]["x"], compared.picture.traces[1]["y"], strict=True))
    assert (line[19], line[20], line[60]) == (0.0, 0.5, 1.0)


def test_the_page_shows_them(tmp_path):
    page = write_report(whole_life(tmp_path / "runs").path).read_text(encoding="utf-8")
    assert '<section id="efficiency"' in page
    assert 'id="efficiency-arithmetic"' in page
    assert '"efficiency-arithmetic": ' in page or '"efficiency-arithmetic":' in page


@pytest.mark.parametrize("scores", [[None], [0.0]])
def test_a_model_without_right_or_judged_answers(tmp_path, scores):
    life = LifeOnDisk(tmp_path / "run")
    life.stage("sft", "sft", "model")
    evaluation(life, "sft", {"a": [(score, 5) for score in scores]})
    found = comparisons(evaluations(read_run(life.path)))
    assert [row[1] for each in found for row in each.table.rows] == ([] if scores == [None] else ["–"])
