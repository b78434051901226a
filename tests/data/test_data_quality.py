import json
import random

import numpy as np
import pytest

from bloomery import config as configs
from bloomery.data import prepare, quality
from bloomery.data.dataset import read_rows
from bloomery.data.prepare import PrepareConfig
from bloomery.data.quality import Classifier, features, measured
from bloomery.errors import ArtifactError, ConfigError

GOOD = ["theorem", "proof", "lemma", "integral", "river", "history", "author", "chapter", "method", "result"]
BAD = ["click", "buy", "cheap", "deal", "login", "cookie", "subscribe", "winner", "casino", "banner"]
BOTH = ["the", "of", "and", "to", "in", "a", "is", "it", "for", "this", "with", "on"]


def texts(words, count, seed, share=0.4):
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(words) if draw.random() < share else draw.choice(BOTH) for _ in range(30))
        for _ in range(count)
    ]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(path, name, found):
    return {"type": "jsonl", "name": name, "path": jsonl(path / f"{name}.jsonl", [{"text": text} for text in found])}


@pytest.fixture(scope="module")
def sorted_folder(tmp_path_factory):
    """A prepared folder whose source `web` is sorted into tiers; its settings."""
    path = tmp_path_factory.mktemp("quality")
    web = [text for pair in zip(texts(GOOD, 100, 1), texts(BAD, 100, 2), strict=True) for text in pair]
    settings = {
        "kind": "documents", "part_bytes": 4000,
        "sources": [source(path, "web", web), source(path, "wiki", texts(GOOD, 20, 3))],
        "quality": {
            "high": [source(path, "books", texts(GOOD, 200, 4, 0.1))],
            "low": [source(path, "spam", texts(BAD, 200, 5, 0.1))],
            "tiers": {"high": 0.25, "medium": 0.25, "low": 0.5}, "sources": ["web"],
        },
    }  # fmt: skip
    manifest = prepare.run(configs.build(PrepareConfig, settings), path / "out")
    return path, settings, manifest


def test_tiers_are_sources_of_their_own_with_their_own_counts(sorted_folder):
    path, _, manifest = sorted_folder
    inventory = manifest.summary["inventory"]
    assert list(inventory) == ["web-high", "web-medium", "web-low", "wiki"]
    assert [inventory[name]["documents"] for name in inventory] == [50, 50, 100, 20]
    assert sum(inventory[f"web-{tier}"]["bytes"] for tier in ("high", "medium", "low")) == sum(
        len(row["text"]) for row in read_rows(path / "out", "documents") if row["source"].startswith("web-")
    )
    best = list(read_rows(path / "out", "documents", "web-high"))
    assert {row["source"] for row in best} == {"web-high"}
    assert all(set(row["text"].split()) & set(GOOD) for row in best)
    scores = {
        tier: [json.loads(row["metadata"])["quality"] for row in read_rows(path / "out", "documents", f"web-{tier}")]
        for tier in ("high", "medium", "low")
    }
    assert min(scores["high"]) >= max(scores["medium"]) >= min(scores["medium"]) >= max(scores["low"])
    assert "quality" not in next(read_rows(path / "out", "documents", "wiki"))["metadata"]


def test_held_out_accuracy_and_calibration_are_reported(sorted_folder):
    found = sorted_folder[2].summary
    assert found["quality"]["accuracy"] > 0.85
    assert found["quality"]["auc"] > 0.9
    assert found["quality"]["calibration_error"] < 0.25
    assert 40 < found["quality"]["held_out_examples"] < 120
    assert sum(row["documents"] for row in found["calibration"]) == found["quality"]["held_out_examples"]


def test_thresholds_stay_when_other_documents_come(sorted_folder, tmp_path):
    path, settings, _ = sorted_folder
    later = {
        **settings, "sources": [source(tmp_path, "new", texts(GOOD, 60, 9))],
        "quality": {"trained": str(path / "out" / "quality")},
    }  # fmt: skip
    manifest = prepare.run(configs.build(PrepareConfig, later), tmp_path / "out")
    held = {name: each["documents"] for name, each in manifest.summary["inventory"].items()}
    assert held["new-low"] == 0  # all good: measured against the first documents, not each other
    assert held["new-high"] + held["new-medium"] == 60
    old = quality.load(path / "out" / "quality")[0]
    for row in read_rows(tmp_path / "out", "documents", "new-high"):
        assert old.tier(old.score(row["text"])) == "high"


def test_labelled_examples(tmp_path):
    rows = [
        {"text": text, "label": label} for label, words in (("high", GOOD), (0, BAD)) for text in texts(words, 150, 7)
    ]
    settings = {"labelled": jsonl(tmp_path / "labels.jsonl", rows), "tiers": {"good": 0.5, "bad": 0.5}}
    config = configs.build(quality.QualityConfig, settings)
    learnt = quality.train(config, [row["text"] for row in rows], tmp_path / "q")
    assert quality.load(tmp_path / "q")[0].thresholds == learnt.thresholds
    assert [learnt.tier(learnt.score(text)) for words in (GOOD, BAD) for text in texts(words, 3, 8)] == [
        *["good"] * 3, *["bad"] * 3,
    ]  # fmt: skip
    rows[3]["label"] = "so-so"
    bad = configs.build(quality.QualityConfig, {"labelled": jsonl(tmp_path / "labels.jsonl", rows)})
    with pytest.raises(ArtifactError, match=r"labels\.jsonl, line 4: label 'so-so', expected 1 or high, 0 or low"):
        quality.train(bad, [], tmp_path / "q")
    few = configs.build(quality.QualityConfig, {"labelled": jsonl(tmp_path / "labels.jsonl", rows[:3] + rows[4:60])})
    with pytest.raises(ArtifactError, match="quality: 0 different bad training examples, expected 20 or more"):
        quality.train(few, [], tmp_path / "q")


def test_measures_by_hand():
    found = measured(np.array([0.95, 0.85, 0.15, 0.85]), np.array([1, 1, 0, 0]))
    assert found["accuracy"] == 0.75
    assert found["auc"] == 0.875  # of four pairs three in order, one tied
    assert found["brier"] == pytest.approx((0.05**2 + 0.15**2 + 0.15**2 + 0.85**2) / 4, abs=1e-4)
    assert found["calibration_error"] == pytest.approx(0.05 / 4 + 0.15 / 4 + 2 * 0.35 / 4, abs=1e-4)


def test_a_score_follows_the_weights():
    weights = np.zeros(2**18, dtype=np.float32)
    weights[features("good")] = 2.0
    classifier = Classifier(weights, 0.0, ("a", "b"), (0.8,))
    assert classifier.score("Good!") == pytest.approx(1 / (1 + np.exp(-2)))
    assert classifier.score("") == classifier.score("other") == 0.5
    assert (classifier.tier(0.8), classifier.tier(0.79)) == ("a", "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "quality: no examples"),
        ({"labelled": "x", "tiers": {"a": 0.5, "b": 0.6}}, "quality.tiers: found .* sum to 1"),
        ({"labelled": "x", "tiers": {"a": 1.0}}, "two or more positive shares"),
        ({"labelled": "x", "sources": ["wbe"]}, "quality.sources: no source 'wbe'; found web, web-low"),
        ({"labelled": "x"}, "sources: web-low is also the name of a quality tier; rename the source"),
        ({"trained": "x", "labelled": "y"}, "quality.labelled: has no effect beside quality.trained"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    sources = [{"type": "stdlib", "name": name} for name in ("web", "web-low")]
    config = configs.build(PrepareConfig, {"kind": "documents", "sources": sources, "quality": settings})
    with pytest.raises(ConfigError, match=message):
        prepare.check(config)
