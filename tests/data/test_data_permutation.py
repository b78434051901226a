import numpy as np
import pytest

from bloomery.data.permutation import key, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4096, 5000])
def test_every_epoch_is_a_bijection(size):
    for epoch in range(3):
        keys = key(7, "web", np.full(size, epoch))
        assert np.array_equal(np.sort(permute(np.arange(size), size, keys)), np.arange(size))


def test_epochs_seeds_and_names_give_unrelated_orders():
    index = np.arange(1000)
    orders = [
        permute(index, 1000, key(seed, name, np.full(1000, epoch)))
        for seed, name, epoch in [(0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0)]
    ]
    for i, first in enumerate(orders):
        assert abs(np.corrcoef(index, first)[0, 1]) < 0.15
        for second in orders[i + 1 :]:
            assert (first == second).sum() < 12  # 1 expected
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_any_place_can_be_asked_alone_and_epochs_can_be_mixed():
    size = 100
    epochs = np.arange(300) // size
    whole = permute(np.arange(300) % size, size, key(3, "s", epochs))
    for place in (0, 99, 100, 250):
        alone = permute(np.array([place % size]), size, key(3, "s", np.array([place // size])))
        assert alone[0] == whole[place]


def test_large_domains_stay_inside():
    size = 3_000_000_019
    index = np.random.default_rng(0).integers(0, size, 10_000)
    out = permute(index, size, key(0, "big", np.zeros(10_000, dtype=np.int64)))
    assert out.min() >= 0
    assert out.max() < size
    assert len(np.unique(out)) == len(np.unique(index))
    assert abs(out.mean() / size - 0.5) < 0.02


def test_first_slot_is_uniform_over_epochs():
    epochs = np.arange(7000)
    first = permute(np.zeros(7000, dtype=np.int64), 7, key(0, "s", epochs))
    counts = np.bincount(first, minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # chi-square with 6 degrees of freedom, p = 0.001
