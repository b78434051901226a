"""A folder written anew is the same model, and the report says so, or where it stops being so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bloomery import cli
from bloomery.errors import ArtifactError, ConfigError
from bloomery.evaluate import parity
from bloomery.evaluate.convert import convert
from bloomery.evaluate.parity import Trace, compare_traces
from bloomery.model import hf
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder


def llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(
        family="llama", pattern="*-*-", vocab_size=37, hidden_size=16, intermediate_size=24, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, mlp_gated=True, mlp_hidden_act="silu", rope=RopeConfig(),
        initializer_range=0.3,
    )  # fmt: skip
    hf.save(Decoder(config), folder)
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["bloomery", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_stage_s_model_with_its_tokenizer(
    tiny_world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source, out = tiny_world.model, tmp_path / "out"
    assert call(monkeypatch, "convert", str(source), str(out), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(found["carried"])
    assert found["parity"]["original_to_export"] == {"max": 0.0, "mean": 0.0, "kl": 0.0, "first_layer": None}
    for name in ("original", "export"):
        assert found["parity"][name]["max"] < 1e-4
        assert found["parity"][name]["first_layer"] is None
    assert sorted(file.name for file in source.iterdir()) == sorted(file.name for file in out.iterdir())
    assert all((source / file.name).read_bytes() == file.read_bytes() for file in out.iterdir())
    assert call(monkeypatch, "convert", str(source), str(out)) == 1
    assert "exists and is not an empty folder; nothing is overwritten" in capsys.readouterr().err


def test_rounding_is_reported_where_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = llama(tmp_path / "source")
    assert call(monkeypatch, "convert", str(source), str(tmp_path / "out"), "--dtype", "bfloat16") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "llama, bfloat16, carried over: generation_config.json" in lines[0]
    assert ["no layer differs" in line for line in lines[2:]] == [True, True, False]
    assert "layers differ from 0 on" in lines[-1]
    assert hf.load(tmp_path / "out").embeddings.weight.dtype == torch.bfloat16


def test_another_family_that_can_hold_the_model(tmp_path: Path) -> None:
    found = convert(llama(tmp_path / "source"), tmp_path / "out", family="mistral")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]
    assert found["carried"] == []
    assert max(difference["max"] for difference in found["parity"].values()) < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "gpt2"}, "--family: 'gpt2' is not supported; choose llama"),
        ({"dtype": "int8"}, "--dtype: 'int8' is unknown; choose float32"),
        ({"family": "nemotron_h"}, "cannot hold this model: its MLPs have no gate; it has no rotary positions"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_behind(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtifactError, match="no such folder; expected a model"):
        convert(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize(("layer", "first"), [(0, 1), (1, 1), (2, 3), (3, 3)])
def test_the_first_layer_that_differs_is_named(layer: int, first: int, tmp_path: Path) -> None:
    """A block of Llama holds two of our layers, so a difference shows at the second."""
    model, peer = hf.load(llama(tmp_path)), parity.load_peer(tmp_path)
    ids = parity.probe_tokens(model.config)
    with torch.no_grad():
        model.layers[layer].norm.weight.mul_(1.1)
    found = compare_traces(parity.trace(model, ids), parity.trace(peer, ids))
    assert found.first_layer == first
    assert found.kl > 1e-6


def test_differences_by_hand() -> None:
    layers = [torch.zeros(1, 2), torch.zeros(1, 2)]
    probabilities = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    one, other = (Trace(layers, p.log()) for p in probabilities)
    found = compare_traces(one, other)
    assert found.max == pytest.approx(0.6931, abs=1e-4)
    assert found.mean == pytest.approx((0.6931 + 0.4055) / 2, abs=1e-4)
    assert found.kl == pytest.approx(0.5 * 0.6931 - 0.5 * 0.4055, abs=1e-4)
    assert found.first_layer is None
    broken = Trace([torch.zeros(1, 2), torch.full((1, 2), torch.nan)], one.logits)
    assert compare_traces(one, broken).first_layer == 1
