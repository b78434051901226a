"""The stage end to end on a tiny model: learns, resumes exactly, refuses what would teach nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bloomery import artifact
from bloomery.config import build
from bloomery.data.dataset import write_rows
from bloomery.data.tokenizer import train_tokenizer
from bloomery.errors import ArtifactError, ConfigError
from bloomery.model import hf
from bloomery.posttrain import sft
from bloomery.posttrain.sft import SFTConfig
from bloomery.train.loop import Step


def config(world: Any, **settings: Any) -> SFTConfig:
    loop = {"max_steps": 10, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every_steps": 4}
    loop |= settings.pop("loop", {})
    defaults = {"seq_len": 32, "validation_fraction": 0.1, "seed": 1, "loop": loop}
    return build(SFTConfig, {"model": world.model, "data": world.messages, **defaults, **settings})


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in artifact.Metrics(folder / "metrics.jsonl").read() if "loss" in row]


def test_it_learns_and_leaves_a_model(tiny_world: Any, tmp_path: Path) -> None:
    manifest = sft.run(config(tiny_world), tmp_path / "out")
    curve = losses(tmp_path / "out")
    assert len(curve) == 10
    assert curve[-1] < 0.7 * curve[0]
    assert manifest.kind == "model"
    assert manifest.summary["examples"] == 23  # 25, of which a tenth is held out
    assert manifest.summary["validation_examples"] == 2
    assert manifest.summary["supervised_tokens"] < manifest.summary["tokens"]
    assert manifest.summary["validation_loss"] < curve[0]
    assert hf.load(artifact.resolve(tmp_path / "out", "model")).config.vocab_size > 256
    assert (tmp_path / "out" / "model" / "chat_template.jinja").is_file()


def test_killed_after_the_last_step_still_ends_with_its_figures(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> None:
        raise ArtifactError("cannot write")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(sft.hf, "save", no_space)
        with pytest.raises(ArtifactError):
            sft.run(config(tiny_world, loop={"max_steps": 3}), tmp_path / "out")
    manifest = sft.run(config(tiny_world, loop={"max_steps": 3}), tmp_path / "out")
    assert (manifest.summary["steps"], manifest.summary["epochs"]) == (3, pytest.approx(12 / manifest.summary["rows"]))
    assert manifest.summary["validation_loss"] > 0


class Killed(Exception):
    """Stands for the end of the process."""


def test_killed_and_rerun_gives_the_same_weights(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft.run(config(tiny_world), tmp_path / "calm")
    original = sft.resumable

    def dying(*args: Any, **kwargs: Any) -> Any:
        for step in original(*args, **kwargs):
            yield step
            if isinstance(step, Step) and step.step == 7:
                raise Killed

    monkeypatch.setattr(sft, "resumable", dying)
    with pytest.raises(Killed):
        sft.run(config(tiny_world), tmp_path / "killed")
    monkeypatch.setattr(sft, "resumable", original)
    manifest = sft.run(config(tiny_world), tmp_path / "killed")
    assert manifest.summary == artifact.read_manifest(tmp_path / "calm").summary  # type: ignore[union-attr]
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")
    for name, tensor in hf.load(tmp_path / "calm" / "model").state_dict().items():
        assert torch.equal(tensor, hf.load(tmp_path / "killed" / "model").state_dict()[name]), name


def test_packing_changes_rows_and_not_what_is_learnt(tiny_world: Any, tmp_path: Path) -> None:
    packed, apart = (sft.check(config(tiny_world, packing=packing)) for packing in (True, False))
    assert packed["rows"] < apart["rows"] == apart["examples"]
    assert packed["supervised_tokens"] == apart["supervised_tokens"]


def test_check_shows_what_is_learnt(tiny_world: Any, tmp_path: Path) -> None:
    shown = sft.check(config(tiny_world, packing=False))["first_row"]
    question, _, rest = shown.partition("⟦")
    assert question.startswith("<|user|>")
    assert question.endswith("=<|endoftext|><|assistant|>")
    assert rest.startswith(r"\boxed{")
    assert rest.partition("⟧")[0].endswith("}<|endoftext|>")
    later = config(tiny_world).model_copy(update={"model": tmp_path / "later"})
    assert "no such folder" in sft.check(later)["inputs"]


def test_examples_longer_than_a_row_are_dropped_and_counted(tiny_world: Any, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "1+1=" * 20}, {"role": "assistant", "content": "2"}], "id": "long"}
    short = {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}], "id": "short"}
    silent = {"messages": [{"role": "user", "content": "1+1="}], "id": "silent"}
    write_rows(tmp_path / "data", "mixed", [long, short, short, silent], "messages")
    found = sft.check(config(tiny_world, data=tmp_path / "data", validation_fraction=0))
    assert found["examples"] == 2
    assert found["dropped"] == {"longer than 32 tokens": 1, "no supervised tokens": 1}


def test_nothing_to_learn_is_an_error(tiny_world: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(4)]
    write_rows(tmp_path / "data", "questions", rows, "messages")
    with pytest.raises(ArtifactError, match="no example is left to train on; dropped: 3 no supervised tokens"):
        sft.run(config(tiny_world, data=tmp_path / "data"), tmp_path / "out")


def test_a_foreign_tokenizer_is_refused(tiny_world: Any, tmp_path: Path) -> None:
    hf.save(hf.load(tiny_world.model), tmp_path / "model")
    train_tokenizer(["many more words in this one " * 3, "other texts, other merges"], 300).save(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ entries, the model's vocabulary 267"):
        sft.run(config(tiny_world, model=tmp_path / "model"), tmp_path / "out")


def test_a_row_longer_than_the_context_is_refused(tiny_world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seq_len: 65 is longer than the model's context of 64"):
        sft.run(config(tiny_world, seq_len=65), tmp_path / "out")
