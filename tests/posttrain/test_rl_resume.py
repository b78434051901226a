"""A run killed at any moment ends with the same weights, metrics and stored rollouts as one that never was."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bloomery import artifact
from bloomery import config as configs
from bloomery.config import build
from bloomery.posttrain.rl_config import RLConfig

MOMENTS = ("rollout", "reward", "update", "save", "store")


def left(folder: Path) -> dict[str, Any]:
    """All that must not depend on kills."""
    rows = artifact.Metrics(folder / "metrics.jsonl").read()
    timeless = [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]
    files = [*folder.glob("data/*.parquet"), *folder.glob("model/*.safetensors")]
    manifest = artifact.read_manifest(folder)
    assert manifest is not None
    digests = {str(file.relative_to(folder)): artifact.file_digest(file) for file in files}
    return {"metrics": timeless, "summary": manifest.summary, **digests}


@pytest.mark.parametrize("updates", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_during_rollout_reward_update_save_and_store(tiny_world: Any, tmp_path: Path, updates: int) -> None:
    loop = {"max_steps": 6, "learning_rate": 2e-2, "schedule": "constant", "checkpoint_every_steps": 1}
    settings: dict[str, Any] = {
        "model": tiny_world.model, "prompts": tiny_world.prompts, "num_prompts": 4, "max_new_tokens": 3, "seed": 1,
        "store_every_steps": 2, "workers": 1, "drop_solved": 1.0, "loop": loop | {"micro_batch_size": 16},
        "phases": [{"until_step": 3, "max_new_tokens": 2}, {"at_most": 0.9}],
    }  # fmt: skip
    if updates > 1:
        settings |= {"updates_per_batch": updates, "clip": {}, "loop": loop}
    config = tmp_path / "config.yaml"
    config.write_text(configs.dump(build(RLConfig, settings)))
    command = [sys.executable, str(Path(__file__).with_name("rl_kills.py")), str(config), str(tmp_path), *MOMENTS]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    ended = json.loads(found.stdout.splitlines()[-1])
    assert ended == {"calm": [0]} | {moment: [signal.SIGKILL, 0] for moment in MOMENTS}, found.stderr[-2000:]
    calm = left(tmp_path / "calm")
    assert calm["model/model.safetensors"]
    for moment in MOMENTS:
        assert left(tmp_path / moment) == calm, moment
