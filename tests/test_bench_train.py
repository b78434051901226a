"""The benchmark of training steps against the machine's matrix products, at tiny sizes."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_what_a_gpu_measures_also_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench import _limit, train

    monkeypatch.setitem(_limit.MATMUL_SIZES, "cpu", 64)
    found = {figure["name"]: figure for figure in train.figures("cpu", quick=True, smoke=True)}
    assert set(found) == {"train/dense_1b", "train/dense_1b_fp8", "train/hybrid_1b", "train/moe_1b"}
    json.dumps(found)
    for figure in found.values():
        assert figure["ours"] > 0
        assert figure["ratio"] > 0
    dense = found["train/dense_1b"]
    assert dense["peer"] == max(dense["limit_fp32"], dense["limit_bf16"])
    assert found["train/dense_1b_fp8"]["peer"] == dense["ours"]


def test_sizes_are_those_that_the_figures_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench import train

    assert all(24e6 < config.count_parameters() < 27e6 for config in train.LIMITS.values())
    assert all(0.8e9 < config.count_parameters() < 1.2e9 for config in train.BILLION.values())
