"""The stage on a real blend: it learns, resumes, and its product loads in transformers with the same logits."""

import json
import math
from pathlib import Path

import pytest
import torch

from bloomery import artifact
from bloomery import config as configs
from bloomery.data import blend
from bloomery.data.dataset import write_rows
from bloomery.data.tokenizer import load_tokenizer, train_tokenizer
from bloomery.errors import ArtifactError, ConfigError, DivergenceError
from bloomery.model import hf
from bloomery.train import pretrain
from bloomery.train.pretrain import PretrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SIZES = {
    "pattern": "M-*-", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "mamba_num_heads": 2, "mamba_head_dim": 16, "ssm_state_size": 16, "chunk_size": 16,
    "max_position_embeddings": 32,
}  # fmt: skip


def counting(start: int) -> str:
    return " ".join(str(number) for number in range(start, start + 12))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """64 sequences of two sources, with validation rows."""
    root = tmp_path_factory.mktemp("data")
    write_rows(root / "documents", "numbers", ({"text": counting(i)} for i in range(150)), "documents")
    write_rows(
        root / "documents", "letters", ({"text": "abc " * (i % 9 + 2) + str(i)} for i in range(150)), "documents"
    )
    train_tokenizer([Path(__file__).read_text()], 300).save(root / "tokenizer")
    sources = {
        "numbers": {"path": root / "documents", "source": "numbers", "weight": 3},
        "letters": {"path": root / "documents", "source": "letters", "weight": 1},
    }
    settings = {"sources": sources, "tokenizer": root / "tokenizer", "seq_len": 32, "sequences": 160}
    blend.run(configs.build(blend.BlendConfig, {**settings, "validation_fraction": 0.2}), root / "tokens")
    return root / "tokens"


def config(tokens: Path, model: dict | None = None, **settings) -> PretrainConfig:
    steps = {
        "max_steps": 20,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "validate_every_steps": 10,
        "checkpoint_every_steps": 6,
    }
    loop = {**steps, **settings.pop("loop", {})}
    origin = {} if "init" in settings else {"model": {**SIZES, **(model or {})}}
    return configs.build(PretrainConfig, {"tokens": tokens, "loop": loop, **origin, **settings})


def rows(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in artifact.Metrics(path / "metrics.jsonl").read()]


@pytest.fixture(scope="module")
def base(tokens, tmp_path_factory) -> Path:
    """A finished stage."""
    path = tmp_path_factory.mktemp("runs") / "base"
    pretrain.run(config(tokens), path)
    return path


def test_it_learns_and_says_what_it_read(tokens, base):
    manifest = artifact.read_manifest(base)
    summary = manifest.summary
    assert (manifest.kind, manifest.stage) == ("model", "pretrain")
    assert (summary["steps"], summary["tokens"]) == (20, 20 * 8 * 32)
    assert summary["sequences"] == {
        name: source["training_sequences"] for name, source in artifact.read_manifest(tokens).summary["sources"].items()
    }
    found = rows(base)
    assert found[0]["loss"] == pytest.approx(math.log(300), rel=0.1)
    assert summary["loss"] < 0.7 * found[0]["loss"]
    assert [row["step"] for row in found if "validation_loss" in row] == [10, 20]
    for name in ("validation_loss", "validation_loss/numbers", "validation_loss/letters"):
        assert summary[name] == found[-1][name]
    assert summary["tokens_per_second"] > 0


def test_the_validation_loss_is_that_of_the_saved_model(tokens, base):
    """Recomputed from the folder with plain cross-entropy, document by document."""
    model, data = hf.load(base / "model"), blend.BlendedRows(tokens)
    total = count = 0
    for batch in data.validation(4, 64):
        with torch.no_grad():
            hidden = model(batch["input_ids"], batch.get("segment_ids"), batch.get("position_ids"))
            logits = model.lm_head(hidden).flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum").item()
        count += int((batch["labels"] != -100).sum())
    assert artifact.read_manifest(base).summary["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_model_folder_loads_in_transformers_with_the_same_logits(base):
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(base / "model").encode("7 8 9 10")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base / "model").eval()
    ours = hf.load(base / "model")
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_vocabulary_and_special_tokens_come_from_the_tokenizer(tokens, base):
    tokenizer = load_tokenizer(tokens / "tokenizer")
    found = hf.load_config(base / "model")
    assert found.vocab_size == tokenizer.vocab_size
    assert found.eos_token_ids == [tokenizer.eos_token_id]
    assert load_tokenizer(base / "model").backend.get_vocab() == tokenizer.backend.get_vocab()


def test_a_run_that_was_cut_ends_the_same(tokens, base, tmp_path, monkeypatch):
    """Cut in the validation after step 10, with a checkpoint at step 6, and again after the last one."""
    validate = pretrain.validation_losses

    def cut(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "validation_losses", cut)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(config(tokens), tmp_path / "base")
    monkeypatch.setattr(pretrain, "validation_losses", validate)
    monkeypatch.setattr(pretrain.hf, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(config(tokens), tmp_path / "base")
    monkeypatch.undo()
    manifest = pretrain.run(config(tokens), tmp_path / "base")
    assert rows(tmp_path / "base") == rows(base)
    file = "model/model.safetensors"
    assert (tmp_path / "base" / file).read_bytes() == (base / file).read_bytes()
    expected = artifact.read_manifest(base).summary
    assert {**manifest.summary, "tokens_per_second": 0} == {**expected, "tokens_per_second": 0}


def test_in_fp8_it_learns_resumes_exactly_and_exports_the_same_names(tokens, base, tmp_path, monkeypatch):
    fp8 = {"precision": "fp8", "fp8": {"high_precision_layers": 1, "measure_every_steps": 10}}
    settings = config(tokens, loop=fp8)
    assert pretrain.check(settings)["fp8"].startswith("6 of 10 linear layers in FP8 (e4m3 forward")
    whole = pretrain.run(settings, tmp_path / "whole")
    assert whole.summary["loss"] == pytest.approx(artifact.read_manifest(base).summary["loss"], rel=0.1)
    monkeypatch.setattr(pretrain.hf, "save", interrupt)
    monkeypatch.setattr(pretrain, "validation_losses", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(settings, tmp_path / "cut")
    monkeypatch.undo()
    assert rows(tmp_path / "cut")[-1]["step"] == 10, "it was cut at its first validation"
    pretrain.run(settings, tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    ours, theirs = (hf.load(tmp_path / run / "model").state_dict() for run in ("cut", "whole"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert ours.keys() == hf.load(base / "model").state_dict().keys()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_finished_stage_is_not_run_again(tokens, base):
    before = (base / "metrics.jsonl").read_bytes()
    assert pretrain.run(config(tokens), base) == artifact.read_manifest(base)
    assert (base / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ArtifactError, match="seed was 0 and is now 1"):
        pretrain.run(config(tokens, seed=1), base)


def test_going_on_from_a_model(tokens, base, tmp_path):
    loop = {"max_steps": 2, "learning_rate": 1e-6, "schedule": "constant"}
    manifest = pretrain.run(config(tokens, init=base, loop=loop), tmp_path / "more")
    before = artifact.read_manifest(base).summary["validation_loss"]
    assert manifest.summary["validation_loss"] == pytest.approx(before, rel=1e-3)


def test_a_larger_vocabulary_is_padding_and_a_smaller_one_is_refused(tokens, tmp_path):
    loop = {"max_steps": 1}
    pretrain.run(config(tokens, {"vocab_size": 320}, loop=loop), tmp_path / "padded")
    assert hf.load_config(tmp_path / "padded" / "model").vocab_size == 320
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size: the model has room for 256 tokens, the tokenizer of .* has 300"
    ):
        pretrain.run(config(tokens, {"vocab_size": 256}), tmp_path / "small")
    assert not (tmp_path / "small").exists(), "a refusal must not occupy the folder"


def test_a_model_with_other_tokens_is_refused(tokens, base, tmp_path):
    other = tmp_path / "other"
    hf.save(hf.load(base / "model"), other)
    train_tokenizer([Path(artifact.__file__).read_text()], 300).save(other)
    with pytest.raises(ConfigError, match=r"init: the tokenizer of .*other and that of .*tokens differ in \d+ tokens"):
        pretrain.run(config(tokens, init=other), tmp_path / "more")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loop": {"max_steps": 21}}, r"loop: 21 steps of 8 read 168 sequences, the plan of .* holds 160"),
        ({"model": {"max_position_embeddings": 16}}, r"max_position_embeddings: 16 is less than the 32 positions"),
        ({"model": {"head_dim": 0}}, "head_dim must be at least 1"),
        ({"model": {"hiden_size": 3}}, "model.hiden_size: unknown key; did you mean hidden_size"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_check_and_run(tokens, tmp_path, settings, message):
    for action in (pretrain.check, lambda wrong: pretrain.run(wrong, tmp_path / "out")):
        with pytest.raises(ConfigError, match=message):
            action(config(tokens, **settings))
    assert not (tmp_path / "out").exists()


def test_exactly_one_origin(tokens, base):
    for origin in ({}, {"model": SIZES, "init": base}):
        with pytest.raises(ConfigError, match="model, init: give exactly one of the two"):
            configs.build(PretrainConfig, {"tokens": tokens, "loop": {"max_steps": 1}, **origin})


def test_tokens_of_another_kind_are_refused(base, tmp_path):
    with pytest.raises(ArtifactError, match="base: holds model, expected tokens"):
        pretrain.run(config(base), tmp_path / "out")


def test_data_that_is_not_the_plan_stops_the_run(tokens, tmp_path, monkeypatch):
    batch = blend.BlendedRows.batch
    monkeypatch.setattr(
        blend.BlendedRows, "batch", lambda self, start, stop: batch(self, 0, stop - start)
    )  # replayed data
    with pytest.raises(DivergenceError, match="sequences were read in .* the plan says"):
        pretrain.run(config(tokens), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_check_counts_without_making_anything(tokens, base):
    found = pretrain.check(config(tokens))
    summary = artifact.read_manifest(base).summary
    assert {name: found[name] for name in ("parameters", "steps", "tokens")} == {
        name: summary[name] for name in ("parameters", "steps", "tokens")
    }
    assert found["state_bytes"] == 16 * found["parameters"]
    assert json.dumps(found)


def test_check_before_the_tokens_exist(tmp_path):
    found = pretrain.check(config(tmp_path / "later", {"vocab_size": 512}))
    assert found["parameters"] > 0
    assert "parameters" not in pretrain.check(config(tmp_path / "later"))
