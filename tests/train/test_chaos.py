"""Ranks are killed at random moments, also while they save, and come back as another number under another mapping."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import LOST_A_PEER, MAPPINGS
from spread_training import new_state, train

from bloomery import artifact

HERE = Path(__file__).parent


def chaos(folder, steps, kills, seed=0):
    """What came of each start, and the losses by step."""
    found = subprocess.run(
        [sys.executable, HERE / "chaos.py", folder, str(steps), str(kills), str(seed)],
        env=os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    rows = [row for row in artifact.Metrics(folder / artifact.METRICS).read() if "loss" in row]
    return [json.loads(line) for line in found.stdout.splitlines()], [row["loss"] for row in rows]


def check(folder, steps, kills):
    starts, losses = chaos(folder, steps, kills)
    assert len(losses) == steps
    assert losses == pytest.approx(train(new_state({}), steps)[0], rel=1e-7)
    assert starts[-1]["codes"] == [0] * MAPPINGS[starts[-1]["mapping"]][0]
    hits = [start for start in starts if start["victim"] is not None]
    for start in hits:
        others = {code for rank, code in enumerate(start["codes"]) if rank != start["victim"]}
        assert others <= {LOST_A_PEER, 0, -15}, start  # 0: had nothing left to do; -15: still waited for a meeting
        assert start["seconds"] < 30, start
    assert any(LOST_A_PEER in start["codes"] for start in hits)
    return len(hits)


def test_killed_six_times_and_resharded_the_losses_are_those_of_a_calm_run(tmp_path):
    assert check(tmp_path / "stage", steps=20, kills=6) >= 4


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    assert check(tmp_path / "stage", steps=220, kills=100) >= 80
