"""Numbers with units, lines that do not lie on each other, curves that are not shifted."""

import itertools
import re

import pytest
from life_on_disk import LifeOnDisk, whole_life

from bloomery.report import curves, facts, lineage, quantities
from bloomery.report.run import read_run

THIN = "\N{NARROW NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tokens", 1_234_567, "1.23 M"), ("tokens", 12_345, f"12{THIN}345"), ("model_bytes", 3 * 2**20, "3.0 MiB"),
        ("wall_seconds", 3_725.0, "1 h 02 min"), ("accuracy", 0.613, f"61.3{THIN}%"), ("loss", 1.15349, "1.153"),
        ("learning_rate", 1e-4, "1e-4"), ("tokens_per_second", 40_123.4, f"40{THIN}123"), ("tied", True, "yes"),
        ("best", None, "–"), ("loss", float("nan"), "not finite"), ("pattern", "M-*-", "M-*-"),
        ("seconds", 59.7, "1 min 00 s"),
    ],
)  # fmt: skip
def test_quantities(name, value, text):
    assert quantities.quantity(name, value) == text


@pytest.mark.parametrize(("value", "text"), [(3.14, "+3.1"), (-3.14, "−3.1"), (0.0, "0.0"), (-0.01, "0.0")])
def test_signed(value, text):
    assert quantities.signed(value) == text


def test_running_mean_is_centred():
    assert curves.running_mean([1.0, 2.0, 3.0, 4.0, 5.0], 3) == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0])
    assert curves.running_mean([0.0, 0.0, 9.0, 0.0, 0.0], 3) == pytest.approx([0.0, 3.0, 3.0, 3.0, 0.0])


def test_long_series_are_thinned_and_gaps_left_out(tmp_path):
    rows = [{"step": i, "loss": float("nan") if i == 3 else 1.0, "odd": "text"} for i in range(4_500)]
    LifeOnDisk(tmp_path / "run").stage("base", "pretrain", "model", metrics=rows)
    (picture,) = curves.pictures(read_run(tmp_path / "run").stages[0])
    assert all(len(trace["x"]) <= curves.MAX_POINTS for trace in picture.traces)
    assert all(len(trace["x"]) == len(trace["y"]) for trace in picture.traces)
    assert 3 not in picture.traces[0]["x"][:5]


def test_a_stage_with_rewards_leads_with_them(tmp_path):
    stage = read_run(whole_life(tmp_path / "run").path).stage("rl")
    titles = [picture.title for picture in curves.pictures(stage) if picture.is_main]
    assert titles[0] == "Reward and accuracy"
    assert titles[-1] == "Policy loss"


def test_parts_share_a_picture_and_one_part_is_no_picture(tmp_path):
    life = LifeOnDisk(tmp_path / "run")
    rows = [{"step": step, "loss": 1.0, "loss/web": 2.0, "accuracy/x": 1.0} for step in (1, 2)]
    life.stage("one", "sft", "model", metrics=rows)
    life.stage("two", "pretrain", "model", metrics=[row | {"loss/code": 0.5} for row in rows])
    one, two = read_run(life.path).stages
    assert [picture.title for picture in curves.pictures(one)] == ["Loss"]
    assert [picture.title for picture in curves.pictures(two)] == ["Loss", "Loss by source"]
    assert [trace["name"] for trace in curves.pictures(two)[1].traces] == ["web", "code"]


def test_what_was_read_stands_beside_what_was_planned(tmp_path):
    life = LifeOnDisk(tmp_path / "run")
    sources = {"web": {"training_sequences": 300}, "code": {"training_sequences": 100}}
    life.stage("blend", "blend", "tokens", summary={"sources": sources})
    life.stage("base", "pretrain", "model", ["blend"], summary={"sequences": {"web": 60, "code": 40}})
    blend, base = read_run(life.path).stages
    ((_, grid),) = facts.planned_and_read(base, [blend])
    assert grid.rows == (
        ("web", "300", f"75.0{THIN}%", "60", f"60.0{THIN}%"),
        ("code", "100", f"25.0{THIN}%", "40", f"40.0{THIN}%"),
    )
    assert facts.planned_and_read(blend, []) == []


def vertical_stretches(edge):
    """(x, top, bottom) of every straight run in an edge's path."""
    x = y = None
    for letter, numbers in re.findall(r"([MCV])([\d ,.-]+)", edge.path):
        values = [int(value) for value in re.split(r"[ ,]", numbers.strip())]
        if letter == "V":
            if values[0] > y:
                yield x, y, values[0]
            y = values[0]
        else:
            x, y = values[-2:]


def test_lines_of_different_sources_never_lie_on_each_other(tmp_path):
    picture = lineage.lineage(read_run(whole_life(tmp_path / "run").path))
    runs = [(edge.source, *stretch) for edge in picture.edges for stretch in vertical_stretches(edge)]
    for (a, x, top, bottom), (b, other, start, end) in itertools.combinations(runs, 2):
        if a != b and x == other and abs(end - start) > lineage.ROW and abs(bottom - top) > lineage.ROW:
            assert end <= top or start >= bottom, f"{a} and {b} share x={x}"
    for node, (source, x, top, bottom) in itertools.product(picture.nodes, runs):
        assert not (node.x == x and top < node.y < bottom), f"a line from {source} runs through {node.name}"


def test_inputs_are_matched_by_digest_and_outside_ones_named(tmp_path):
    life = LifeOnDisk(tmp_path / "run")
    life.stage("sft", "sft", "model", ["elsewhere"], config="inputs:\n  elsewhere: /models/llama\n")
    life.stage("rl", "rl", "model", ["sft"])
    sft, rl = read_run(life.path).stages
    assert (sft.sources, sft.outside) == ((), ("llama",))
    assert (rl.sources, rl.outside) == (("sft",), ())


def test_summaries_of_unknown_shape_are_rendered(tmp_path):
    summary = {
        "loss": 0.5,
        "nested": {"a": 1, "b": {"deep_seconds": 2.0}},
        "list": [1, 2],
        "by_source": [{"source": "x", "rows": 3}],
    }
    LifeOnDisk(tmp_path / "run").stage("sft", "sft", "model", summary=summary)
    (stage,) = read_run(tmp_path / "run").stages
    assert facts.summary_rows(stage) == [
        ("loss", "0.5"), ("nested · a", "1"), ("nested · b · deep seconds", "2.0 s"), ("list", "1, 2"),
    ]  # fmt: skip
    ((title, grid),) = facts.summary_tables(stage)
    assert (title, grid.columns, grid.rows) == ("by source", ("rows",), (("x", "3"),))


def test_rows_are_counted_where_a_stage_gave_no_account(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = LifeOnDisk(tmp_path / "run").stage("corpora", "prepare", "documents")
    (folder / "data").mkdir()
    for part, rows in (("web-00000", 3), ("web-00001", 4), ("code-00000", 5)):
        pq.write_table(pa.table({"text": ["x"] * rows}), folder / "data" / f"{part}.parquet")
    ((_, grid),) = facts.data_tables(read_run(tmp_path / "run").stages[0])
    assert [(row[0], row[1]) for row in grid.rows] == [("code", "5"), ("web", "7")]
