"""`bloomery verify audit`: dataset folders and stored rollouts, and the exit code."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from bloomery.cli import app
from bloomery.data.dataset import write_rows
from bloomery.errors import ArtifactError
from bloomery.posttrain.audit import audit

QUESTIONS = {"a": ("What is 2 and 3 together?", "5"), "b": ("What is 1 and 1 together?", "2")}


def dataset(folder, questions):
    rows = [
        {"prompt": [{"role": "user", "content": question}], "answer": answer, "verifier": "answer", "id": id}
        for id, (question, answer) in questions.items()
    ]
    write_rows(folder, "sums", rows, "prompts")
    return folder


def rollouts(folder, scores):
    rows = [
        {"id": id, "source": "sums", "completion": text, "answer": QUESTIONS[id][1], "score": score, "status": "?"}
        for id, text, score in scores
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "rollouts-00001.parquet")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, ["verify", "audit", *map(str, arguments)])


def test_a_sound_dataset_passes(tmp_path):
    result = invoke(dataset(tmp_path / "d", QUESTIONS), "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["error"] == 0.0
    assert found["prompts"]["sources"]["sums"]["prompts"] == 2
    shown = invoke(tmp_path / "d").stdout
    assert "prompts  sums: 2 prompts" in shown
    assert "estimated error: 0.00%" in shown


def test_too_many_bad_prompts_fail_unless_allowed(tmp_path):
    folder = dataset(tmp_path / "d", QUESTIONS | {"c": ("Simplify $\\sqrt{192}$.", "8\\sqrt{3}")})
    result = invoke(folder)
    assert result.exit_code == 1
    assert "sums c, formula echo: correct, expected not correct: '\\\\boxed{\\\\sqrt{192}}'" in result.stdout
    assert "estimated error 33.33% is above 1.00%" in result.output
    assert invoke(folder, "--max-error", "0.34").exit_code == 0
    assert invoke(folder, "--limit", "2").exit_code == 0


def test_stored_rollouts_are_judged_again(tmp_path):
    folder = dataset(tmp_path / "d", QUESTIONS)
    fine = [("a", "\\boxed{5}", 1.0), ("a", "\\boxed{6}", 0.0), ("b", "", 0.0), ("b", "\\boxed{2}", None)]
    assert audit(folder, rollouts(tmp_path / "fine", fine))["error"] == 0.0
    stored = rollouts(tmp_path / "bad", [*fine, ("b", "\\boxed{3}", 1.0)])
    found = audit(folder, stored)
    assert found["error"] == 0.25, "one of four that were judged"
    [wrong] = found["rollouts"]["worst"]
    assert (wrong["id"], wrong["expected"], wrong["status"]) == ("b", "correct", "wrong")
    assert invoke(folder, "--rollouts", stored).exit_code == 1


def test_rollouts_as_jsonl_may_name_their_verifier(tmp_path):
    row = {"id": "x", "completion": "\\boxed{B}", "answer": "B", "score": 0.0, "verifier": "choice", "source": "m"}
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(row) + "\n")
    found = audit(dataset(tmp_path / "d", QUESTIONS), file)
    assert found["rollouts"]["sources"]["m"]["differing"] == 1.0


def test_bad_rollouts_are_explained(tmp_path):
    folder = dataset(tmp_path / "d", QUESTIONS)
    with pytest.raises(ArtifactError, match="no rollouts; expected Parquet or JSONL"):
        audit(folder, tmp_path / "missing")
    file = tmp_path / "r.jsonl"
    file.write_text('{"id": "a", "completion": "", "answer": "5"}\n')
    with pytest.raises(ArtifactError, match="line 1: no column 'score'; found id, completion, answer"):
        audit(folder, file)


def test_prompts_that_stand_in_a_benchmark_are_named(tmp_path):
    shared = "A farmer has seven cows and sells three of them to his neighbour. How many are left?"
    train = dataset(tmp_path / "d", QUESTIONS | {"c": (shared, "4"), "d": (shared.replace("seven", "8 or 9"), "5")})
    exam = dataset(tmp_path / "exam", {"x": ("Tell me. " + shared, "4")})
    found = audit(train, benchmarks=[exam])
    assert (found["overlap"]["share"], found["error"]) == (0.5, 0.5)
    assert found["overlap"]["benchmarks"] == {str(exam): 2}
    result = invoke(train, "--benchmark", exam)
    assert result.exit_code == 1
    assert "overlap: 2 prompts (50.00%) hold nine words of a benchmark's prompt; 0 more with other" in result.stdout
    assert f"c and {exam} 1: a farmer has seven cows" in result.stdout
    assert audit(exam, benchmarks=[dataset(tmp_path / "other", QUESTIONS)])["overlap"]["prompts"] == 0
