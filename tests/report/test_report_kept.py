import re

import pytest
from life_on_disk import LifeOnDisk

from bloomery.report.kept import kept
from bloomery.report.report import render
from bloomery.report.run import read_run

SOURCES = {
    "web": {"kept": 60, "bytes": 900, "dropped": {f"reason {n}": n for n in range(1, 9)} | {"<b>": 4}},
    "wiki": {"kept": 40, "bytes": 800, "dropped": {}},
}


def prepared(path, sources, **summary):
    LifeOnDisk(path).stage("corpora", "prepare", "documents", summary={"sources": sources, **summary})
    return read_run(path)


def test_bars_add_up_and_the_rarest_reasons_share_a_colour(tmp_path):
    run = prepared(tmp_path, SOURCES)
    found = kept(run.stage("corpora"))
    web, wiki = found.bars
    assert (web.read, web.kept, sum(segment.count for segment in web.segments)) == (100, 60, 100)
    assert [(segment.label, segment.count) for segment in web.segments] == [
        ("kept", 60), ("reason 8", 8), ("reason 7", 7), ("reason 6", 6), ("reason 5", 5), ("reason 4", 4),
        ("other reasons", 10),
    ]  # fmt: skip
    assert sum(segment.share for segment in web.segments) == pytest.approx(1)
    assert [segment.label for segment in wiki.segments] == ["kept"]
    assert [color for _, color in found.legend] == [0, 1, 2, 3, 4, 5, 6]
    assert found.reasons.rows[0][:3] == ("web", "8", "7")
    assert set(found.reasons.rows[1][1:]) == {"–"}


def test_the_page_shows_bars_inventory_and_reasons(tmp_path):
    inventory = {"web-high": {"documents": 20, "bytes": 300}, "web-low": {"documents": 40, "bytes": 600}}
    page = render(prepared(tmp_path, SOURCES, inventory=inventory))
    assert 'aria-label="web: of 100 documents, 60 kept, 8 reason 8' in page
    assert "60 of 100 kept" in page
    assert "<caption>inventory</caption>" in page
    assert "<caption>dropped</caption>" in page
    assert "web-high" in page
    assert "<caption>sources</caption>" not in page
    assert "&lt;b&gt;" in page
    assert re.search(r'class="k0" style="width:60\.000%"', page)


def test_other_stages_have_no_bars(tmp_path):
    run = prepared(tmp_path, {"stdlib": {"documents": 3}})
    assert kept(run.stage("corpora")) is None
    assert "kept-row" not in render(run).split("</style>")[1]
