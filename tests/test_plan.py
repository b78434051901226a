"""`bloomery plan` from files to words, JSON and a picture."""

import json
from pathlib import Path

import pytest

from bloomery import cli, plan, recipe
from bloomery.config import build, parse_yaml
from bloomery.errors import ConfigError
from bloomery.model import hf
from bloomery.model.config import ModelConfig
from bloomery.parallel.mapping import Mapping

ROOT = Path(__file__).parent.parent
MODEL = """
family: mixtral
pattern: "*E*E*E*E"
vocab_size: 1024
hidden_size: 512
num_attention_heads: 8
num_key_value_heads: 4
head_dim: 64
n_routed_experts: 8
moe_intermediate_size: 1024
router_activation: softmax
mlp_gated: true
mlp_hidden_act: silu
rope: {rope_theta: 10000.0}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.yaml"
    file.write_text(MODEL)
    return file


def call(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["bloomery", "plan", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return ended.value.code, shown.out, shown.err


def test_words(monkeypatch, capsys, model):
    code, out, _ = call(monkeypatch, capsys, str(model), "--cluster", "8xH100", "--sequence", "2048", "--batch", "64")
    assert code == 0
    assert out.startswith("8xH100, 64 sequences of 2,048 tokens a step; ")
    for part in ("chosen: ", "MFU ", "GB a GPU: weights ", "matrix products", "runners-up:", " slower, most in "):
        assert part in out
    pasted = parse_yaml(out.partition("settings:\n")[2])
    assert build(Mapping, pasted["parallel"]).world_size == 8


def test_json_and_a_picture(monkeypatch, capsys, model, tmp_path):
    picture = tmp_path / "deep" / "scaling.svg"
    monkeypatch.setattr(plan, "LARGEST", 16)
    words = (str(model), "--cluster", "8xA100", "--batch", "64", "--simulate", str(picture), "--json")
    code, out, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    found = json.loads(out)
    assert found["picture"] == str(picture)
    assert "<svg" in picture.read_text()
    chosen = found["chosen"]
    assert chosen["mfu_low"] < chosen["mfu"] < chosen["mfu_high"]
    assert sum(chosen["seconds_by_part"].values()) == pytest.approx(chosen["seconds"])
    memory = chosen["memory_bytes"]
    assert sum(size for name, size in memory.items() if name != "total") == pytest.approx(memory["total"])
    assert found["sequence"] == 4096
    assert all(other["seconds"] >= chosen["seconds"] for other in found["runners_up"])


def test_a_recipe_says_its_batch_itself():
    choice = plan.plan(ROOT / "recipes" / "tiny.yaml", "4xH100", None, None)
    model, seq_len, sequences = plan.read(ROOT / "recipes" / "tiny.yaml")
    assert (choice.batch.seq_len, choice.batch.sequences) == (seq_len, sequences) == (128, 32)
    assert model.vocab_size == 512


def test_the_mapping_is_written_into_the_recipe(monkeypatch, capsys, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text((ROOT / "recipes" / "tiny-moe.yaml").read_text())
    code, out, _ = call(monkeypatch, capsys, str(file), "--cluster", "8xH100", "--write")
    assert code == 0
    assert out.endswith(f"written into {file}: base.parallel, base.loop.micro_batch_size\n")
    _, steps = recipe.load(file)
    [base] = [step.config for step in steps if step.stage == "pretrain"]
    chosen = plan.plan(file, "8xH100", None, None).best[0]
    assert base.parallel.mapping(8) == chosen.mapping
    assert base.loop.micro_batch_size == chosen.micro_batch_size
    before, after = (ROOT / "recipes" / "tiny-moe.yaml").read_text().splitlines(), file.read_text().splitlines()
    assert [line for line in before if line.lstrip().startswith("#")] == [
        line for line in after if line.lstrip().startswith("#")
    ]
    assert len(set(before) - set(after)) <= 2


def test_a_mapping_for_other_sizes_is_not_written(monkeypatch, capsys, tmp_path, model):
    file = tmp_path / "recipe.yaml"
    file.write_text((ROOT / "recipes" / "tiny-moe.yaml").read_text())
    code, _, err = call(monkeypatch, capsys, str(file), "--cluster", "8xH100", "--batch", "64", "--write")
    assert code == 2
    assert "chosen for 64 sequences of 128 tokens, but the recipe says other sizes" in err
    code, _, err = call(monkeypatch, capsys, str(model), "--cluster", "8xH100", "--batch", "64", "--write")
    assert code == 2
    assert "--write needs a recipe" in err


def test_a_model_folder(tmp_path, model):
    config = hf.export_config(build(ModelConfig, parse_yaml(MODEL)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    from_folder, seq_len, sequences = plan.read(tmp_path / "folder")
    assert (seq_len, sequences) == (None, None)
    assert from_folder.count_parameters() == plan.read(model)[0].count_parameters()


def test_another_gpu_is_said_to_be_unproven(model):
    assert "fitted to runs on H100; B200 is taken" in plan.text(plan.plan(model, "4xB200", None, 64))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cluster", "8xH1000"), "did you mean 8xH100?"),
        (("--cluster", "8xH100", "--imbalance", "0.5"), "--imbalance 0.5: the fullest rank over the mean; expected 1"),
        (("--cluster", "16xH100", "--sequence", "33", "--batch", "1"), "no mapping is valid"),
    ],
)
def test_refusals(monkeypatch, capsys, model, words, message):
    code, out, err = call(monkeypatch, capsys, str(model), *words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_recipe_without_a_model(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stages:\n  tokenizer: {inputs: [x]}\n")
    with pytest.raises(ConfigError, match="no stage pretrain that makes a model; give the folder of a model instead"):
        plan.read(recipe)
