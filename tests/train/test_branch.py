"""Two phases as one run: branches off a trunk, the ledger over attempts and world sizes, and the alarms."""

import json
from pathlib import Path

import numpy as np
import pytest
from distributed import run
from test_pretrain import SIZES, counting, interrupt

from bloomery import artifact
from bloomery import config as configs
from bloomery.data import blend
from bloomery.data.blended import BlendedRows
from bloomery.data.dataset import write_rows
from bloomery.data.tokenizer import train_tokenizer
from bloomery.errors import ArtifactError, ConfigError, DivergenceError
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.settings import ParallelConfig
from bloomery.train import pretrain
from bloomery.train.account import Account
from bloomery.train.alarms import Alarms, Watch
from bloomery.train.loop import LoopConfig
from bloomery.train.pretrain import PretrainConfig
from bloomery.train.spread import row_batches, spread

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FIRST = {"share": 0.5, "weights": {"numbers": 1, "letters": 3}}


def blended(root: Path, name: str, second: dict, **settings) -> Path:
    sources = {source: {"path": root / "documents", "source": source} for source in ("numbers", "letters")}
    phases = [FIRST, {"share": 0.5, "weights": second}] if second else [FIRST]
    base = {"sources": sources, "tokenizer": root / "tokenizer", "seq_len": 32, "sequences": 64, "phases": phases}
    blend.run(configs.build(blend.BlendConfig, {**base, "validation_fraction": 0.2, **settings}), root / name)
    return root / name


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Blends `a` and `b`, whose second phases differ, and `other`, whose first phase does too."""
    root = tmp_path_factory.mktemp("data")
    texts = {"numbers": [counting(i) for i in range(60)], "letters": ["abc " * (i % 9 + 2) + str(i) for i in range(60)]}
    for source, found in texts.items():
        write_rows(root / "documents", source, ({"text": text} for text in found), "documents")
    train_tokenizer([Path(__file__).read_text()], 300).save(root / "tokenizer")
    blended(root, "a", {"numbers": 3, "letters": 1})
    blended(root, "b", {"numbers": 1, "letters": 0})
    blended(root, "other", {"numbers": 1, "letters": 0}, seed=1)
    return root


def config(tokens: Path, steps: int = 8, **settings) -> PretrainConfig:
    loop = {
        "max_steps": steps,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "decay_fraction": 0.5,
        **settings.pop("loop", {}),
    }
    origin = {} if "trunk" in settings else {"model": SIZES}
    return configs.build(PretrainConfig, {"tokens": tokens, "loop": loop, **origin, **settings})


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run over both phases of `a` whose point of the switch is kept."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    pretrain.run(config(data / "a", branch_steps=[4], loop={"checkpoint_every_steps": 1}), path)
    return path


def weights(path: Path) -> bytes:
    return (path / "model" / "model.safetensors").read_bytes()


def test_points_to_branch_from_stay(whole):
    kept = sorted(folder.name for folder in (whole / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000007", "step-00000008"]


def test_what_was_read_is_what_was_planned(data, whole):
    summary, rows = artifact.read_manifest(whole).summary, BlendedRows(data / "a")
    assert [source["sequences"] for source in summary["read"].values()] == rows.plan.drawn.tolist()
    for name, read in summary["read"].items():
        found = rows._rows[rows.names.index(name)].tokens
        assert read["unique_tokens"] <= found.sum()
        assert read["most_reads"] == -(-read["sequences"] // len(found))


def test_a_branch_over_the_same_data_ends_as_the_run_it_left(data, whole, tmp_path):
    manifest = pretrain.run(config(data / "a", trunk=whole, trunk_step=4), tmp_path / "branch")
    assert weights(tmp_path / "branch") == weights(whole)
    assert manifest.summary["read"] == artifact.read_manifest(whole).summary["read"]
    assert manifest.inputs["trunk"] == artifact.read_manifest(whole).key


def test_a_branch_reads_a_second_phase_of_its_own_and_resumes(data, whole, tmp_path, monkeypatch):
    settings = config(data / "b", trunk=whole, trunk_step=4, loop={"checkpoint_every_steps": 1})
    manifest = pretrain.run(settings, tmp_path / "branch")
    plan = BlendedRows(data / "b").plan
    assert [source["sequences"] for source in manifest.summary["read"].values()] == plan.drawn.tolist()
    assert weights(tmp_path / "branch") != weights(whole)
    monkeypatch.setattr(pretrain, "validation_losses", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(settings, tmp_path / "cut")
    monkeypatch.undo()
    pretrain.run(settings, tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "branch")


@pytest.mark.parametrize(
    ("tokens", "settings", "error", "message"),
    [
        ("other", {}, ArtifactError, "checkpoint at sequence 32 has read other data than this blend begins with"),
        ("b", {"trunk_step": 5}, ArtifactError, r"no checkpoint after step 5; it holds those after steps 4, 7, 8"),
        ("b", {"trunk_step": 7}, ConfigError, r"learning rate of step \d is .* branch before its decay"),
        ("b", {"steps": 4}, ConfigError, "max_steps: 4, but the trunk has made 4 steps"),
        ("b", {"loop": {"weight_decay": 0.2}}, ConfigError, r"loop\.weight_decay: 0\.2, the trunk .* had 0\.1"),
    ],
)
def test_a_branch_that_would_not_have_come_the_same_way_is_refused(
    data, whole, tmp_path, tokens, settings, error, message
):
    if settings.get("trunk_step") == 7:
        settings = {**settings, "loop": {"decay_fraction": 0.2}}
    with pytest.raises(error, match=message):
        pretrain.run(config(data / tokens, trunk=whole, **{"trunk_step": 4, **settings}), tmp_path / "branch")


def test_origins_exclude_one_another(data, whole):
    with pytest.raises(ConfigError, match="model, init: give exactly one of the two, or trunk"):
        configs.build(PretrainConfig, {"tokens": data / "a", "loop": {"max_steps": 1}, "init": whole, "trunk": whole})
    with pytest.raises(ConfigError, match="trunk_step: has no effect without trunk"):
        config(data / "a", trunk_step=3)


def test_replayed_rows_stop_the_run_at_its_next_checkpoint(data, tmp_path, monkeypatch):
    """As many of each source as planned, but the second phase starts its sources anew."""
    monkeypatch.setattr(BlendedRows, "_draw", restarted)
    with pytest.raises(DivergenceError, match="rows were replayed or left out"):
        pretrain.run(config(data / "a"), tmp_path / "out")


def restarted(self, start, stop):
    source, number = self.plan.order(start, stop)
    begun = self.plan.counts_at(self.plan.ends[0] if start >= self.plan.ends[0] else 0)
    return source, (number - begun[source]) % np.array(self.plan.rows)[source]


def read_part(ranks_then, tokens, saved, until):
    """This rank reads its rows of the steps up to `until`; what all have read is returned as a checkpoint holds it."""
    rows, loop = BlendedRows(tokens), LoopConfig(max_steps=8, batch_size=8)
    model = Decoder(ModelConfig(**{**SIZES, "vocab_size": 300}))
    state = spread(model, ParallelConfig(), loop, rows.seq_len)
    state.extra, state.position = json.loads(saved) if saved else {}, ranks_then
    account = Account(rows, state)
    account.open()
    for _, _ in zip(
        range((until - ranks_then) // 8), row_batches(rows, ranks_then, loop, state.parallel), strict=False
    ):
        pass
    state.position = until
    account.close()
    return json.dumps(state.extra)


def test_the_account_goes_on_over_world_sizes(data):
    """One rank, a cut, two ranks, a cut, one: `close` compares counts and every row with the plan each time."""
    saved = read_part(0, data / "a", None, 24)
    saved = run(2, read_part_of_two, data / "a", saved)[0]
    found = json.loads(read_part(48, data / "a", saved, 64))
    assert found["ledger"]["sequences"] == BlendedRows(data / "a").plan.drawn.tolist()


def read_part_of_two(tokens, saved):
    return read_part(24, tokens, saved, 48)


def test_forgetting_is_told_from_the_second_phase_on():
    watch = Watch(Alarms(memorizing=None), {})
    first, later = {"validation_loss": 2.0, "validation_loss/web": 2.0}, {"validation_loss/web": 2.05}
    assert watch.validated(first, 0, {}) == {}
    assert watch.validated({"validation_loss/web": 2.5}, 0, {}) == {}
    assert watch.validated({"validation_loss/web": 2.03}, 1, {}) == {}
    resumed = Watch(watch.limits, json.loads(json.dumps(watch.memory)))
    found = resumed.validated(later, 1, {})
    assert found["forgetting/web"].startswith("web: validation loss 2.05, 2.5% above the 2 of the phases before")


def test_learning_by_heart_is_told_of_repeated_sources_only():
    watch = Watch(Alarms(forgetting=None, window=2), {})
    for loss in (9.0, 1.0, 1.2):
        watch.trained({"loss/wiki": loss, "grad_norm": 1.0})
    validation = {"validation_loss/wiki": 2.0}
    assert watch.validated(validation, 0, {"wiki": 1.0}) == {}
    assert "after 3.0 epochs its training loss 1.1 is 45.0% below" in watch.validated(validation, 0, {"wiki": 3.0})[
        "memorizing/wiki"
    ]  # fmt: skip


def test_an_alarm_is_logged_and_may_end_the_run(data, tmp_path, monkeypatch):
    def losses(model, *_: object) -> dict[str, float]:
        return {"validation_loss/letters": float(next(steps))}

    steps = iter([1.0, 2.0])
    monkeypatch.setattr(pretrain, "validation_losses", losses)
    pretrain.run(config(data / "a"), tmp_path / "told")
    rows = artifact.Metrics(tmp_path / "told" / "metrics.jsonl").read()
    assert [row["step"] for row in rows if "alarms" in row] == [8]
    steps = iter([1.0, 2.0])
    with pytest.raises(DivergenceError, match="step 8: letters: validation loss 2, 100.0% above the 1"):
        pretrain.run(config(data / "a", alarms={"stop": True}), tmp_path / "stopped")
