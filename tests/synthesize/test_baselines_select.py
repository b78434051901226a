"""The other measures by hand, and selections that beat random ones."""

import math

import numpy as np
import pytest

from bloomery.data.document import Drops
from bloomery.synthesize import baselines, select, vendi
from bloomery.synthesize.map import cluster, density
from bloomery.synthesize.samples import read_samples
from bloomery.synthesize.vendi import Moments
from bloomery.train.model_folder import open_model


def pool(seed=0):
    """Sixteen directions with noise, nine tenths of the rows in one of them."""
    draw = np.random.default_rng(seed)
    chosen = np.where(draw.random(400) < 0.9, 0, draw.integers(0, 16, 400))
    return np.eye(32)[chosen] + 0.05 * draw.normal(size=(400, 32))


def score(rows, weights=None):
    return vendi.score(vendi.spectrum(Moments.of(rows, weights).density))


def test_surface_measures_by_hand():
    found = baselines.surface(["a b a", "a b"])
    assert found["1-gram entropy"] == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)))
    assert found["2-gram entropy"] == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert found["distinct 1-grams"] == pytest.approx(2 / 5)
    assert found["3-gram entropy"] == 0
    same, mixed = ["same words"] * 50, [str(n) for n in range(200)]
    assert baselines.surface(same)["gzip ratio"] < baselines.surface(mixed)["gzip ratio"]


def test_vector_measures_by_hand():
    two = np.repeat(np.eye(4)[:2], 3, axis=0)
    found = baselines.of_rows(two, "x")
    assert found["x Vendi"] == pytest.approx(2)
    assert found["x Vendi, order 2"] == pytest.approx(2)
    assert found["x mean distance"] == pytest.approx(1 - 12 / 30)  # 2 · 3 · 2 equal ordered pairs of 30
    assert found["x DCScore"] == pytest.approx(2, rel=1e-6)
    assert found["x log-determinant"] == pytest.approx(math.log1p(0.5 / 0.1))
    assert baselines.dcscore(np.eye(5)) == pytest.approx(5, rel=1e-6)
    assert baselines.occupancy(np.repeat(np.eye(4), 8, axis=0), clusters=4) == pytest.approx(math.log(4))


def learnt(samples):
    return sorted(sample.ids[sample.learnt].tolist() for sample in samples)


def test_embeddings_do_not_see_padding_and_shuffling_keeps_the_parts(tiny_world):
    from bloomery.model import hf

    start = open_model(tiny_world.model)
    samples = list(read_samples(tiny_world.messages, start.tokenizer, 64, Drops()))
    model = hf.load(start.path)
    together = baselines.embeddings(model, samples, start.pad_id)
    alone = np.concatenate([baselines.embeddings(model, [sample], start.pad_id) for sample in samples[:3]])
    assert together[:3] == pytest.approx(alone, abs=1e-5)
    mixed = baselines.shuffled(samples)
    assert [sample.id for sample in mixed] == [sample.id for sample in samples]
    assert learnt(mixed) == learnt(samples)
    assert any((a.ids.tolist() != b.ids.tolist()) for a, b in zip(mixed, samples, strict=True))


@pytest.mark.parametrize("choose", [select.greedy, select.by_gain])
def test_selections_are_more_diverse_than_chance(choose):
    rows = pool()
    taken = choose(rows, 40)
    assert len(set(taken.tolist())) == 40
    chance = np.mean([score(rows[np.random.default_rng(n).choice(400, 40, replace=False)]) for n in range(5)])
    assert score(rows[taken]) > 2 * chance
    with pytest.raises(ValueError, match="401 of 400 samples"):
        choose(rows, 401)


def test_greedy_is_the_brute_force_choice():
    rows = np.random.default_rng(1).normal(size=(12, 5))
    unit = vendi.unit(rows)
    first, *following = select.greedy(rows, 4)  # the first is as good as any
    matrix, left = 0.05 * np.eye(5) + np.outer(unit[first], unit[first]), [n for n in range(12) if n != first]
    for place in following:
        volumes = {n: np.linalg.slogdet(matrix + np.outer(unit[n], unit[n]))[1] for n in left}
        assert place == max(volumes, key=volumes.get)
        matrix += np.outer(unit[place], unit[place])
        left.remove(place)


def test_clusters_and_density_see_copies():
    unit = vendi.unit(np.concatenate([np.repeat(np.eye(8)[:1], 12, axis=0), np.eye(8)[1:3], -np.eye(8)[1:3]]))
    labels = cluster(unit, 2, seed=0)
    assert len(set(labels[:12])) == 1
    assert np.bincount(labels)[0] >= 12
    dense = density(unit)
    assert dense[:12] == pytest.approx(np.ones(12))
    assert dense[12:].max() < 0.1


def test_weights_raise_the_score_within_their_bound():
    rows = pool()
    found = select.weights(rows)
    assert found.mean() == pytest.approx(1, abs=1e-3)
    assert found.max() <= 4 + 1e-6
    assert score(rows, found) > 1.5 * score(rows)
