"""The page as a whole, over a life written by hand."""

import itertools
import json
import re
import shutil

import pytest
from life_on_disk import whole_life

from bloomery.errors import ArtifactError
from bloomery.report.report import write_report

SCRIPTS = re.compile(r"<script(?! type=\"application/json\")[^>]*>.*?</script>", re.DOTALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return whole_life(tmp_path_factory.mktemp("runs") / "tiny").path


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markup(page):
    """The page without its scripts, where plotly's own strings would answer for ours."""
    return SCRIPTS.sub("", page)


def test_the_page_lies_in_the_run_unless_told_otherwise(run, tmp_path):
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "page.html") == tmp_path / "page.html"
    assert (tmp_path / "page.html").read_text() == (run / "report.html").read_text()


def test_head_says_what_ran_and_for_how_long(markup):
    assert "<h1>tiny</h1>" in markup
    assert "11 of 12 stages finished" in markup
    assert "bloomery 0.1.0" in markup
    # 21.4 + 6.2 + 9.8 + 131 + 4 + 61.3 + 1.1 + 144.9 + 3 × 12.5 = 417.2 s
    assert "6 min 57 s" in markup


def test_every_stage_is_in_the_list_and_in_the_picture(run, markup):
    for folder in run.iterdir():
        if folder.is_dir():
            assert f'<li data-stage="{folder.name}">' in markup
            assert f'<details class="stage" id="stage-{folder.name}">' in markup
    assert markup.count('<use class="node') == 12
    assert 'data-from="base" data-to="sft"' in markup
    assert 'data-from="rl" data-to="evaluate_rl"' in markup


def test_an_unfinished_stage_is_shown_as_such(markup):
    row = re.search(r'<li data-stage="export">.*?</li>', markup, re.DOTALL)[0]
    assert "unfinished" in row
    assert "not there yet" in row
    assert "nothing logged yet" in row


def test_an_interrupted_training_shows_how_far_it_came(run, tmp_path):
    cut = shutil.copytree(run / "base", tmp_path / "tiny" / "base")
    (cut / "manifest.json").unlink()
    (cut / "metrics.jsonl").write_text('{"step": 1, "loss": 6.0}\n{"step": 40, "loss": 3.0}\n{"step": 41, "lo')
    page = SCRIPTS.sub("", write_report(tmp_path / "tiny").read_text())
    assert "0 of 1 stages finished" in page
    assert "reached step 40 of 300" in page
    assert "loss 6 → 3" in page


def test_a_damaged_manifest_is_reported_not_fatal(run, tmp_path):
    broken = shutil.copytree(run / "tokenizer", tmp_path / "tiny" / "tokenizer")
    (broken / "manifest.json").write_text('{"kind": ')
    page = SCRIPTS.sub("", write_report(tmp_path / "tiny").read_text())
    assert "damaged JSON" in page
    assert 'class="status damaged"' in page


def test_model_text_is_escaped(page, markup):
    assert "&lt;script&gt;alert(&#39;owned&#39;)&lt;/script&gt; &amp; &lt;b&gt;bold&lt;/b&gt;" in markup
    assert "<script>alert(" not in page
    assert "<b>bold" not in page


def test_a_series_name_cannot_end_the_data_block(tmp_path):
    from life_on_disk import LifeOnDisk

    rows = [{"step": step, "</script><img src=x>": float(step)} for step in (1, 2)]
    LifeOnDisk(tmp_path / "run").stage("sft", "sft", "model", metrics=rows)
    page = write_report(tmp_path / "run").read_text()
    assert "<img" not in page
    block = re.search(r'<script type="application/json" id="curve-data">(.*?)</script>', page, re.DOTALL)[1]
    assert any("<img" in trace["name"] for curve in json.loads(block).values() for trace in curve["traces"])


def test_nothing_is_fetched(markup):
    assert not re.search(r'(?:src|href|action|data|srcset)\s*=\s*["\']?(?:https?:)?//', markup)
    assert "@import" not in markup
    assert "url(" not in markup
    assert "<link" not in markup.replace('<link rel="icon" href="data:,">', "")
    assert "default-src 'none'" in markup  # the browser itself refuses every request


def test_curves_are_drawn_by_an_inline_plotly(page, markup):
    assert page.count("plotly.js v") == 1
    assert page.count("<script src") == 0
    data = json.loads(re.search(r'id="curve-data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["curve-base-loss"]["unit"] == "nats per token"
    drawn = {trace["name"]: trace for trace in data["curve-base-loss"]["traces"] if trace["role"] == "line"}
    assert drawn.keys() == {"loss", "validation loss"}
    assert drawn["validation loss"]["x"] == list(range(25, 301, 25))
    for identity in data:
        assert f'id="{identity}" role="img" aria-label=' in markup


def test_data_models_and_settings(markup):
    data = re.search(r'<section id="data".*?</section>', markup, re.DOTALL)[0]
    assert "stdlib" in data
    assert "2.91 M" in data
    assert "59.8" in data
    assert "1.27" in data
    models = re.search(r'<section id="models".*?</section>', markup, re.DOTALL)[0]
    assert models.count("18\N{NARROW NO-BREAK SPACE}528") == 3  # 2 · 96² + 96
    assert "pattern M-M-*-M-" in models
    assert "learning_rate: 0.003" in markup


def test_headings_descend_without_gaps_and_ids_are_unique(markup):
    levels = [int(level) for level in re.findall(r"<h([1-6])", markup)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = re.findall(r'\sid="([^"]+)"', markup)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', markup)) <= set(ids)


def test_the_same_run_gives_the_same_page(run, page, tmp_path):
    assert write_report(run, tmp_path / "again.html").read_text() == page


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: (path / "notes").mkdir(parents=True)])
def test_a_folder_without_stages_is_refused(tmp_path, make):
    make(tmp_path / "empty")
    with pytest.raises(
        ArtifactError, match=r"empty: holds no stage; expected one folder per stage.*Run a recipe first"
    ):
        write_report(tmp_path / "empty")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder"):
        write_report(tmp_path / "runs" / "tiny")
