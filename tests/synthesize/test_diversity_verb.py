"""From a dataset to a score, as the command line does it: cut, resumed, shared among ranks, merged, refused."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from bloomery.cli import app
from bloomery.config import build
from bloomery.data.dataset import write_rows
from bloomery.errors import ArtifactError
from bloomery.synthesize import sketching, vendi
from bloomery.synthesize.compare import compare
from bloomery.synthesize.score import by_length, score
from bloomery.synthesize.shards import Sketches
from bloomery.synthesize.sketching import SketchingConfig, sketch_dataset


@pytest.fixture(scope="module")
def settings(tiny_world):
    return {"data": tiny_world.messages, "proxy": tiny_world.model, "sketch": {"dim": 64}}


@pytest.fixture(scope="module")
def folder(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("sketches") / "sums"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketching, "ROWS_PER_BLOCK", 10)
        sketch_dataset(build(SketchingConfig, settings), out)
    return out


def chats(*pairs):
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "id": f"chat-{n}"}
        for n, (q, a) in enumerate(pairs)
    ]


def test_blocks_hold_unit_rows_and_their_header(folder):
    files = sorted(file.name for file in folder.iterdir())
    assert files == [f"sketches-0000{n}-of-00003.parquet" for n in range(3)]
    sketches = Sketches(folder)
    assert sketches.column("id") == [f"sum-{n}" for n in range(25)]
    rows = sketches.rows()
    assert rows.shape == (25, 64)
    assert rows.dtype == np.float16
    assert np.square(rows.astype(float)).mean(1) == pytest.approx(np.ones(25), rel=1e-2)
    assert sketches.header.loss == "mean −log p of the completion's tokens, nats"
    assert all(loss > 0 for loss in sketches.column("loss"))
    assert set(sketches.column("tokens")) <= set(range(3, 12))


def test_a_cut_run_makes_only_what_is_missing_and_ranks_share(folder, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sketching, "ROWS_PER_BLOCK", 10)
    config = build(SketchingConfig, settings)
    for rank in (1, 0):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        sketch_dataset(config, tmp_path / "shared")
        if rank:
            with pytest.raises(ArtifactError, match=r"block 0 of 3 is missing; run the same `diversity sketch`"):
                Sketches(tmp_path / "shared")
    assert (Sketches(tmp_path / "shared").rows() == Sketches(folder).rows()).all()
    kept = (tmp_path / "shared" / "sketches-00001-of-00003.parquet").stat().st_mtime_ns
    (tmp_path / "shared" / "sketches-00002-of-00003.parquet").unlink()
    monkeypatch.delenv("WORLD_SIZE")
    sketch_dataset(config, tmp_path / "shared")
    assert (tmp_path / "shared" / "sketches-00001-of-00003.parquet").stat().st_mtime_ns == kept
    assert len(Sketches(tmp_path / "shared")) == 25


def test_other_maps_do_not_mix(folder, settings, tmp_path):
    other = build(SketchingConfig, {**settings, "sketch": {"dim": 64, "seed": 1}})
    with pytest.raises(ArtifactError, match=r"sketch .*'seed': 0.*, the other sketches have .*'seed': 1"):
        sketch_dataset(other, folder)
    sketch_dataset(other, tmp_path / "other")
    with pytest.raises(ArtifactError, match="only sketches of the same proxy, map and settings"):
        score(folder, tmp_path / "other")
    with pytest.raises(ArtifactError, match="25 ids are there more than once, first 'sum-0'"):
        score(folder, folder)
    with pytest.raises(ArtifactError, match="no sketches; make them with `bloomery diversity sketch`"):
        score(tmp_path)


def test_the_score_is_that_of_the_rows(folder):
    found = score(folder, sizes=[5, 10, 20, 500])
    rows = Sketches(folder).rows()
    assert found["g_vendi"] == pytest.approx(vendi.score(vendi.spectrum_of(rows)), rel=1e-4)
    assert found["interval"][0] < found["g_vendi"] < found["interval"][1]
    assert list(found["rarefied"]) == ["5", "10", "20", "limit"]
    assert found["rarefied"]["5"] < found["rarefied"]["10"] < found["g_vendi"] < found["rarefied"]["limit"]
    assert found["of_ceiling"] == pytest.approx(found["g_vendi"] / vendi.ceiling(25, 64))
    assert {part["size"] for part in found["lengths"]} == {6}
    assert found["perplexity"] > 100
    assert any("near chance" in note for note in found["notes"])  # the proxy has never been trained


def test_both_paths_and_the_command_line_agree(tiny_world, folder, tmp_path):
    arguments = [
        str(tiny_world.messages),
        "--proxy",
        str(tiny_world.model),
        "--dim",
        "64",
        "--out",
        str(tmp_path / "s"),
    ]
    result = CliRunner().invoke(app, ["diversity", "score", *arguments, "--size", "10", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["g_vendi"] == pytest.approx(score(folder)["g_vendi"], rel=1e-6)
    shown = CliRunner().invoke(app, ["diversity", "score", str(tmp_path / "s"), "--size", "10"]).stdout
    assert f"G-Vendi            {found['g_vendi']:.2f}  [" in shown
    assert "  rarefied to 10" in shown


def test_unusable_samples_are_counted_and_too_many_refused(tiny_world, tmp_path):
    rows = chats(*[(f"{n}+0=", f"{n}") for n in range(199)], ("1+1=", "2" * 200))
    write_rows(tmp_path / "long", "sums", rows, "messages")
    config = {"data": tmp_path / "long", "proxy": tiny_world.model, "sketch": {"dim": 16}, "max_tokens": 32}
    sketch_dataset(build(SketchingConfig, config), tmp_path / "s")
    assert score(tmp_path / "s")["dropped"] == {"completion longer than 32 tokens": 1}
    write_rows(tmp_path / "bad", "sums", rows[-2:], "messages")
    sketch_dataset(build(SketchingConfig, {**config, "data": tmp_path / "bad"}), tmp_path / "t")
    with pytest.raises(ArtifactError, match=r"1 of 2 samples have no gradient to compare \(first: chat-199\)"):
        score(tmp_path / "t")


def test_only_the_beginning_of_a_prompt_is_cut(tiny_world, tmp_path):
    write_rows(tmp_path / "d", "sums", chats(("1+" * 60 + "1=", "7"), ("1+1=", "2")), "messages")
    config = {"data": tmp_path / "d", "proxy": tiny_world.model, "sketch": {"dim": 16}, "max_tokens": 24}
    sketch_dataset(build(SketchingConfig, config), tmp_path / "s")
    assert Sketches(tmp_path / "s").column("tokens") == [2, 2]
    assert any("1 prompts lost their beginning" in note for note in score(tmp_path / "s")["notes"])


def test_an_answer_that_is_missing_has_no_gradient(tiny_world, tmp_path):
    prompts = [{"prompt": [{"role": "user", "content": "1+1="}], "answer": "", "verifier": "answer", "id": "empty"}]
    write_rows(tmp_path / "d", "sums", prompts, "prompts")
    config = {"data": tmp_path / "d", "proxy": tiny_world.model, "sketch": {"dim": 16}}
    sketch_dataset(build(SketchingConfig, config), tmp_path / "s")
    with pytest.raises(ArtifactError, match=r"1 of 1 samples have no gradient to compare \(first: empty\)"):
        score(tmp_path / "s")


def test_gradients_below_half_precision_survive(folder):
    """Without scaling, entries of a gradient of 1e-9 would all be 0 in float16."""
    from bloomery.synthesize.shards import Columns, read_block, write_block

    block = read_block(next(folder.glob("*"))).model_copy(update={"number": 0, "blocks": 1})
    z = np.random.default_rng(0).normal(size=(3, 64)) * 1e-9
    tiny = Columns(["a", "b", "c"], ["s"] * 3, np.ones(3), np.full(3, 0.01), np.linalg.norm(z, axis=1), z)
    write_block(folder.parent / "tiny", block, tiny)
    held = vendi.unit(Sketches(folder.parent / "tiny").rows())
    assert (held * vendi.unit(z)).sum(1) == pytest.approx(np.ones(3), abs=1e-5)
    assert any("0.010 nats: it knows the answers" in note for note in score(folder.parent / "tiny")["notes"])


def test_lengths_are_scored_apart_at_one_size():
    rows = np.concatenate([np.eye(16)[np.arange(40) % 2], np.eye(16)[np.arange(40) % 10]])
    found = by_length(rows, np.repeat([3, 9], 40), draws=4, seed=0)
    assert [part["tokens"] for part in found] == [(3, 3), (3, 3), (9, 9), (9, 9)]
    assert [part["score"] for part in found] == pytest.approx([2, 2, 10, 10])


def test_the_sketch_itself_is_named_as_the_limit(folder):
    found = score(folder)
    assert any("above a quarter of the sketch's 64 dimensions" in note for note in found["notes"]) == (
        found["g_vendi"] > 16
    )
    assert not math.isnan(found["halves"][0])


def run(*arguments):
    return CliRunner().invoke(app, ["diversity", *map(str, arguments)])


def test_selections_and_weights_from_the_command_line(folder):
    kept = [json.loads(line)["id"] for line in run("select", folder, "--count", 5).stdout.splitlines()]
    assert len(set(kept)) == 5
    weighed = [json.loads(line) for line in run("select", folder).stdout.splitlines()]
    assert sum(line["weight"] for line in weighed) == pytest.approx(25, abs=0.01)
    refused = run("select", folder, "--count", 26)
    assert "--count: 26 of 25 samples; choose at most all" in str(refused.exception)


@pytest.mark.slow
def test_the_map_is_one_offline_page(tiny_world, folder, tmp_path):
    page = tmp_path / "map.html"
    found = json.loads(run("map", folder, "--out", page, "--data", tiny_world.messages, "--json").stdout)
    assert (found["samples"], found["clusters"]) == (25, 2)
    text = page.read_text()
    assert "4+4=" in text.replace("\\u003d", "=")
    assert "colour by density" in text
    assert 'src="http' not in text  # offline


def test_other_measures_stand_in_the_same_table(settings):
    found = compare(build(SketchingConfig, settings), size=20)
    assert found["G-Vendi"] > 1
    assert {"embedding Vendi, centred", "embedding DCScore", "2-gram entropy", "perplexity"} <= found.keys()
    assert {"G-Vendi, completions shuffled", "G-Vendi, untrained proxy", "gradient cluster occupancy"} <= found.keys()
    assert all(math.isfinite(value) for value in found.values())
