import random

import numpy as np
import pytest

from bloomery.data.dedup import MinHashConfig, NearDedup, signature
from bloomery.data.words import tokens

CONFIG = MinHashConfig()
WORDS = [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]


def changed(words, count, random):
    """The text with `count` of its words replaced, and its Jaccard index of runs of five words with the first."""
    other = list(words)
    for place in random.sample(range(len(words)), count):
        other[place] = "changed"
    runs, others = ({tuple(each[i : i + 5]) for i in range(len(each) - 4)} for each in (words, other))
    return " ".join(other), len(runs & others) / len(runs | others)


def test_places_agree_as_often_as_runs_are_shared():
    draw, errors = random.Random(0), []
    for count in (1, 3, 8, 20) * 8:
        words = draw.choices(WORDS, k=200)
        text, jaccard = changed(words, count, draw)
        agreed = np.mean(signature(" ".join(words), CONFIG) == signature(text, CONFIG))
        errors.append(agreed - jaccard)
    assert abs(np.mean(errors)) < 0.02  # 32 · 112 places, standard error below 0.01
    assert np.std(errors) < 0.06


def test_near_copies_go_and_different_texts_stay():
    draw, near = random.Random(1), NearDedup(CONFIG)
    texts = [draw.choices(WORDS, k=60) for _ in range(1100)]  # more than the table begins with
    assert all(near.is_new(signature(" ".join(words), CONFIG)) for words in texts)
    for words in texts[::100]:
        text, jaccard = changed(words, 1, draw)
        assert jaccard > 0.8
        assert not near.is_new(signature(text.upper() + "!", CONFIG))
        half, _ = changed(words, 15, draw)
        assert near.is_new(signature(half, CONFIG))


def test_a_candidate_below_the_threshold_is_kept():
    draw = random.Random(2)
    words = draw.choices(WORDS, k=300)
    text, jaccard = changed(words, 18, draw)
    assert 0.5 < jaccard < 0.65
    for threshold, new in ((0.8, True), (0.4, False)):
        near = NearDedup(MinHashConfig(threshold=threshold, bands=56, rows=2))
        assert near.is_new(signature(" ".join(words), near.config))
        assert near.is_new(signature(text, near.config)) is new


@pytest.mark.parametrize("text", ["", "!!!", "one", "one two three", "\ud800 x"])
def test_short_texts_equal_only_themselves(text):
    near = NearDedup(CONFIG)
    assert near.is_new(signature(text, CONFIG))
    assert not near.is_new(signature(text, CONFIG))
    assert near.is_new(signature("another thing", CONFIG))
    assert near.is_new(signature("???", CONFIG))


def test_words_are_shared_not_changed():
    assert tokens("a B") is tokens("a B")
