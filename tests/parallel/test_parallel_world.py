"""Ranks under a real torchrun: who runs what, one voice for errors, and a stage that is killed and started again."""

import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run

from bloomery import artifact, recipe
from bloomery.config import dump
from bloomery.errors import ConfigError, PeerError
from bloomery.parallel import world as worlds
from bloomery.parallel.settings import ParallelConfig
from bloomery.parallel.world import Peers, agreed, any_rank, explained, reports, world
from bloomery.posttrain import sft
from bloomery.train.loop import LoopConfig

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
BIN = Path(sys.executable).parent
SHORT = [
    "corpus.sources.0.max_documents=60", "corpus.sources.1.count=300", "lessons.sources.0.count=120",
    "tokenizer.vocab_size=300", "base.model.vocab_size=300", "blend.sequences=80", "blend.seq_len=64",
    "base.loop.max_steps=10", "base.loop.batch_size=8", "base.loop.warmup_steps=1",
    "base.loop.checkpoint_every_steps=2",
    "sft.loop.max_steps=2", "sft.loop.batch_size=8", "sft.loop.warmup_steps=1", "sft.seq_len=96",
    "base.parallel.timeout_seconds=20", "sft.parallel.timeout_seconds=20",
    "exam.sources.0.count=2", "eval.num_samples=1", "eval.max_new_tokens=4",
]  # fmt: skip
"""recipes/tiny-moe.yaml with every stage, in seconds."""
TWO = [f"{stage}.parallel.{degree}" for stage in ("base", "sft") for degree in ("tensor=2", "context=1", "expert=2")]


def torchrun(ranks, program, *, restarts=0, shell=""):
    """torchrun with a program's words; `shell` is run by each rank before it."""
    words = [BIN / "bloomery", *program]
    if shell:
        words = ["bash", "-c", f'{shell}; exec "$@"', "rank", *words]
    options = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--no-python"]
    return subprocess.Popen(
        [BIN / "torchrun", *options, *map(str, words)], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def losses(stage):
    rows = artifact.Metrics(stage / artifact.METRICS).read()
    return [row["loss"] for row in rows if "loss" in row]


def stage_processes(launcher):
    """The processes in which stages run: children of torchrun's children."""
    found = []
    for child in _children(launcher.pid):
        found += _children(child)
    return found


def _children(process):
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def wait_for(stage, step, launcher):
    while len(losses(stage)) < step and launcher.poll() is None:
        time.sleep(0.02)


def life(run, *more):
    return ["run", "recipes/tiny-moe.yaml", "--out", run, *SHORT, *more]


@pytest.mark.slow
def test_a_life_under_torchrun_is_that_of_one_process_killed_or_not(tmp_path):
    alone = subprocess.run([BIN / "bloomery", *life(tmp_path / "alone")], cwd=ROOT, check=False)
    assert alone.returncode == 0
    launcher = torchrun(2, life(tmp_path / "killed", *TWO), restarts=3)
    draw = random.Random(0)
    for step in (3, 6):
        wait_for(tmp_path / "killed" / "base", step, launcher)
        victims = stage_processes(launcher)
        if victims:
            os.kill(draw.choice(victims), signal.SIGKILL)
            while any(Path(f"/proc/{process}").exists() for process in victims) and launcher.poll() is None:
                time.sleep(0.05)
    said, _ = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, said[-3000:]
    assert "ended by signal 9" in said
    assert "pretrain  goes on after step" in said
    assert losses(tmp_path / "killed" / "base") == pytest.approx(losses(tmp_path / "alone" / "base"), rel=2e-2)
    for stage, took_part in (("corpus", 1), ("base", 2), ("sft", 2), ("eval", 1)):
        assert artifact.read_manifest(tmp_path / "killed" / stage).world == took_part
    assert [
        row["step"] for row in artifact.Metrics(tmp_path / "killed/base/metrics.jsonl").read() if "loss" in row
    ] == [*range(1, 11)]


def test_sigterm_to_one_rank_saves_on_all_and_one_process_goes_on(tiny_world, tmp_path):
    loop = LoopConfig(max_steps=60, batch_size=4, learning_rate=1e-3, checkpoint_every_steps=50, precision="fp32")
    config = sft.SFTConfig(model=tiny_world.model, data=tiny_world.messages, seq_len=32, loop=loop)
    alone, folder = tmp_path / "alone", tmp_path / "ranks"
    sft.run(config, alone)
    (tmp_path / "sft.yaml").write_text(dump(config))
    launcher = torchrun(2, ["sft", tmp_path / "sft.yaml", "--out", folder])
    wait_for(folder, 2, launcher)
    os.kill(_children(launcher.pid)[-1], signal.SIGTERM)
    said, _ = launcher.communicate(timeout=120)
    done = len(losses(folder))
    assert 2 <= done < loop.max_steps, said[-3000:]
    assert said.count("bloomery: rank") == 1, said[-3000:]
    assert "interrupted; run the same command to continue" in said
    assert "exitcode  : 130" in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    sft.run(config, folder)
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-3)


def test_different_settings_on_two_ranks_are_refused_once(tmp_path):
    settings = tmp_path / "prompts.yaml"
    settings.write_text("stages: {exam: {stage: prepare, kind: prompts, sources: [{name: chain, type: procedural, "
                        "task: chain, count: 4}]}}")  # fmt: skip
    launcher = torchrun(
        2, ["run", settings, "--out", tmp_path / "run"], shell='[ "$RANK" = 1 ] && set -- "$@" exam.sources.0.count=5'
    )
    said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "bloomery: rank 1: exam.sources: [{" in said
    assert "on rank 0; give all ranks the same" in said
    assert said.count("bloomery: rank") == 1
    assert "exitcode  : 2" in said


def test_the_environment_says_who_this_is(monkeypatch):
    assert (world().rank, world().size, world().is_main) == (0, 1, True)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    assert world() == worlds.World(3, 4, 1, 2)
    assert not world().is_main
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 4, but torchrun did not start this process; start it with"):
        agreed("anything", str)
    worlds.leave()
    assert world() == worlds.World(0, 1, 0, 0)


def test_one_process_asks_nobody():
    assert agreed("x", lambda: "own") == "own"
    assert any_rank(True)
    assert not any_rank(False)
    assert reports("an error", consequence=True)


def test_only_the_silence_of_others_is_a_peer_error():
    with pytest.raises(PeerError, match="another rank has died or does not answer"), explained():
        raise RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(PeerError, match="closed by peer"), explained():
        raise RuntimeError("[Stage 1] failed to run forward") from RuntimeError("/gloo/pair.cc: closed by peer")
    with pytest.raises(RuntimeError, match="shapes"), explained():
        raise RuntimeError("shapes do not match")


def test_degrees_are_checked_against_the_ranks():
    assert ParallelConfig(tensor=2, expert=4).mapping(8).data == 4
    assert ParallelConfig(tensor=2, expert=8).smallest == 8
    assert ParallelConfig(data=3, pipeline=2).smallest == 6
    with pytest.raises(ConfigError, match=r"parallel: .* does not divide 8 ranks; for tensor 3 choose 1, 2, 4 or 8"):
        ParallelConfig(tensor=3).mapping(8)
    with pytest.raises(ConfigError, match="these degrees are for 2 ranks or a multiple, but this is one process"):
        ParallelConfig(tensor=2).mapping(1)


def test_what_differs_on_a_rank_is_named(tmp_path):
    source = {"name": "chain", "type": "procedural", "task": "chain", "count": 4}
    config = recipe.stage_config("prepare").model_validate({"kind": "prompts", "sources": [source]})
    step = recipe.Step("exam", "prepare", config, tmp_path, ())
    assert recipe._left_to_do(step)
    assert not recipe.runs_on_all_ranks(step)
    theirs = config.model_dump(mode="json") | {"kind": "messages"}
    assert recipe._difference(theirs, config) == "kind: 'prompts' on rank 0, 'messages' on rank 0"


def hang():
    """Rank 1 comes too late to a group whose ranks wait for one second."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(2)
        return ""
    try:
        with explained():
            dist.all_reduce(torch.ones(1), group=group)
    except PeerError as error:
        return str(error)
    return "nothing"


def test_a_rank_that_hangs_is_waited_for_only_so_long():
    said, _ = run(2, hang)
    assert "another rank has died or does not answer" in said
    assert "Timed out waiting 1000ms" in said
    assert "Run the same command to continue" in said


def speak(values):
    peers = Peers()
    return peers.gather(values[peers.rank]), peers.first(values[peers.rank]), any_rank(peers.rank == 1)


def test_peers_exchange_plain_objects():
    assert run(2, speak, [{"a": 1}, "b"]) == [([{"a": 1}, "b"], {"a": 1}, True)] * 2
