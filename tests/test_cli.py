"""Exit codes, messages and JSON of the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bloomery import cli, recipe
from bloomery.errors import ArtifactError, ConfigError, DivergenceError

ROOT = Path(__file__).parent.parent
PREPARE = "kind: prompts\nsources:\n  - {name: chain, type: procedural, task: chain, count: 20}\n"


def call(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["bloomery", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("a: b"), 2), (ArtifactError("a: b"), 1), (DivergenceError("a: b"), 3), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(recipe, "load", fail)
    assert call(monkeypatch, "run", "r.yaml") == code
    shown = capsys.readouterr().err
    assert shown.startswith("bloomery: ")
    assert "Traceback" not in shown


@pytest.mark.parametrize("words", [("rnu",), ("run",), ("run", "--nothing")])
def test_wrong_use_is_exit_code_2(monkeypatch, words):
    assert call(monkeypatch, *words) == 2


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(recipe, "load", lambda *_: 1 / 0)
    monkeypatch.setattr("sys.argv", ["bloomery", "run", "r.yaml"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_stage_alone_with_json(monkeypatch, capsys, tmp_path):
    (tmp_path / "p.yaml").write_text(PREPARE)
    out = tmp_path / "out"
    assert call(monkeypatch, "prepare", str(tmp_path / "p.yaml"), "sources.0.count=7", "--out", str(out), "--json") == 0
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["kind"], manifest["summary"]["documents"]) == ("prompts", 7)
    assert call(monkeypatch, "prepare", str(out / "config.yaml")) == 0  # its own folder: done before
    assert "done before" in capsys.readouterr().err


def test_a_stage_alone_needs_a_folder(monkeypatch, capsys, tmp_path):
    (tmp_path / "p.yaml").write_text(PREPARE)
    assert call(monkeypatch, "prepare", str(tmp_path / "p.yaml")) == 2
    assert "--out: missing; give the folder" in capsys.readouterr().err


def test_check_writes_nothing_and_speaks_json(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "check", str(ROOT / "recipes" / "tiny.yaml"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stages"]["base"]["stage"] == "pretrain"
    assert not list(tmp_path.iterdir())


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "p.yaml").write_text(PREPARE.replace("count: 20", "count: 60000, options: {max_ops: 4}"))
    command = [sys.executable, "-m", "bloomery", "prepare", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "out" / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 130, shown
    assert "interrupted; run the same command to continue" in shown
    assert "Traceback" not in shown
    subprocess.run([*command, "sources.0.count=60000"], check=True, capture_output=True)
    assert (tmp_path / "out" / "manifest.json").exists()
