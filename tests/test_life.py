"""The whole life: recipes/tiny.yaml learns what it should, and no kill changes what comes out."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bloomery import artifact

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "tiny.yaml"
SHORT = [
    "corpus.sources.1.count=3000", "lessons.sources.0.count=3000",
    "base.loop.max_steps=50", "base.loop.batch_size=16", "base.loop.checkpoint_every_steps=10",
    "sft.loop.max_steps=50", "sft.loop.batch_size=16", "sft.loop.checkpoint_every_steps=10",
    "rl.loop.max_steps=6", "rl.loop.checkpoint_every_steps=1",
    "rl-code.loop.max_steps=5", "rl-code.loop.checkpoint_every_steps=1", "rl-code.prompts='@problems'",
    "eval-base.max_problems=32", "eval-sft.max_problems=32", "eval-rl.max_problems=32", "eval-rl-code.max_problems=32",
]  # fmt: skip
"""Keeps every stage and shrinks it; some answers are right by then, so that RL has a signal. No program is, so the code
stage goes on with math."""
TIMING = ("seconds", "tokens_per_second", "milliseconds")


def command(out: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "bloomery", "run", str(RECIPE), "--out", str(out), *overrides]


def value(report: Path, metric: str, task: str) -> tuple[float, float]:
    rows = json.loads((report / "report.json").read_text())
    [row] = [row for row in rows if row["metric"] == metric and row["task"] == task]
    return row["value"], row["stderr"]


def check_floors(run: Path) -> dict[str, float]:
    """The floors that the recipe promises: the loss falls, SFT lands in its band, RL lifts math and then code."""
    losses = [row["loss"] for row in artifact.Metrics(run / "base" / "metrics.jsonl").read() if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    scores = [value(run / f"eval-{name}", "avg@4", "chain") for name in ("base", "sft", "rl")]
    (base, _), (sft, sft_error), (rl, rl_error) = scores
    assert base < sft
    assert 0.20 <= sft <= 0.65, sft
    assert rl - sft >= 0.15, (sft, rl)
    assert rl - sft > 1.96 * (sft_error**2 + rl_error**2) ** 0.5  # conservative: the items are the same
    before, after = (value(run / f"eval-{name}", "avg@4", "programs")[0] for name in ("rl", "rl-code"))
    assert after - before >= 0.1, (before, after)
    assert (run / "report.html").stat().st_size > 100_000
    return {"base": base, "sft": sft, "rl": rl, "rl-code": after}


def test_the_tiny_recipe_meets_its_floors(tmp_path):
    subprocess.run(command(tmp_path / "run"), check=True, cwd=ROOT)
    check_floors(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_floors_hold_on_other_seeds(tmp_path, seed):
    subprocess.run(command(tmp_path / "run", f"seed={seed}"), check=True, cwd=ROOT)
    check_floors(tmp_path / "run")


def final_numbers(run: Path) -> dict[str, object]:
    """Everything a run leaves that must not depend on how often it was cut: weights, metrics, scores, summaries."""
    found: dict[str, object] = {}
    for folder in sorted(path for path in run.iterdir() if path.is_dir()):
        manifest = artifact.read_manifest(folder)
        assert manifest is not None
        found[f"{folder.name}/summary"] = _timeless(manifest.summary)
        found[f"{folder.name}/metrics"] = [_timeless(row) for row in artifact.Metrics(folder / "metrics.jsonl").read()]
        for file in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.parquet"), *folder.glob("report.json")]):
            found[str(file.relative_to(run))] = artifact.file_digest(file)
    return found


def _timeless(value):
    if isinstance(value, dict):
        return {name: _timeless(item) for name, item in value.items() if not name.endswith(TIMING)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def timed_run(out: Path, *overrides: str) -> float:
    """Seconds of an undisturbed run."""
    start = time.monotonic()
    subprocess.run(command(out, *overrides), check=True, cwd=ROOT)
    return time.monotonic() - start


def killed_run(out: Path, kills: int, longest_seconds: float, *overrides: str) -> int:
    """Start the recipe again and again, killing it after a random time; then let it finish. Returns kills that hit."""
    moments, hits = random.Random(0), 0
    for _ in range(kills):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command(out, *overrides), cwd=ROOT, **quiet)
        try:
            process.wait(timeout=moments.uniform(0.5, longest_seconds))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            hits += 1
            time.sleep(0.3)  # the stage's process follows its parent within a moment
    subprocess.run(command(out, *overrides), check=True, cwd=ROOT)
    return hits


def test_killed_and_rerun_gives_the_same_numbers(tmp_path):
    seconds = timed_run(tmp_path / "calm", *SHORT)
    assert killed_run(tmp_path / "killed", 5, seconds / 3, *SHORT) >= 2
    assert final_numbers(tmp_path / "killed") == final_numbers(tmp_path / "calm")


@pytest.mark.slow
def test_twenty_kills_of_the_whole_demo(tmp_path):
    seconds = timed_run(tmp_path / "calm")
    assert killed_run(tmp_path / "killed", 20, seconds / 9) >= 15
    assert final_numbers(tmp_path / "killed") == final_numbers(tmp_path / "calm")
