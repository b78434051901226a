"""What `inspect` says of a model follows from its sizes alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from bloomery import cli
from bloomery.model import hf
from bloomery.model.config import ModelConfig
from bloomery.model.summary import CONTEXTS, summarize

NEMOTRON_8B = ModelConfig(
    pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", vocab_size=131072, hidden_size=4096,
    intermediate_size=21504, num_attention_heads=32, num_key_value_heads=8, head_dim=128, mamba_num_heads=128,
    ssm_state_size=128, n_groups=8,
)  # fmt: skip


def test_the_published_8b() -> None:
    found = summarize(NEMOTRON_8B)
    assert found["layers"] == {"Mamba-2": 24, "MLP": 24, "attention": 4}
    assert found["parameters"] == found["active_parameters"] == pytest.approx(8.101e9, rel=1e-3)
    assert found["weight_bytes"] == {
        n: found["parameters"] * k for n, k in (("float32", 4), ("bfloat16", 2), ("float16", 2))
    }
    mebibytes = [found["cache_bytes"][context] / 2**20 for context in CONTEXTS]
    # arithmetic of arXiv 2504.03624
    assert mebibytes == pytest.approx([129, 225, 1.10 * 1024, 2.10 * 1024, 16.1 * 1024], rel=1e-2)
    assert found["forward_flops_per_token"][65536] * 65536 == pytest.approx(1.06e15 + 0.14e15, rel=0.05)
    assert "n_routed_experts" not in found["sizes"]
    assert found["sizes"]["mamba_num_heads"] == 128


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["bloomery", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_inspect_needs_nothing_but_config_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf.export_config(NEMOTRON_8B), default=str))
    assert call(monkeypatch, "inspect", str(tmp_path), "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["pattern"] == NEMOTRON_8B.pattern
    assert found["cache_bytes"]["2048"] == summarize(NEMOTRON_8B)["cache_bytes"][2048]
    assert call(monkeypatch, "inspect", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "family: nemotron_h" in shown
    assert "faster_from_tokens: 2,610" in shown
    assert "2,048: 129.4 MiB" in shown


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ({"model_type": "gpt2"}, 2, "model_type 'gpt2' is not supported; choose llama"),
        ({"model_type": "llama", "num_attention_heads": 2}, 2, "missing; a value is required"),
        ([1], 2, "model_type None is not supported"),
        (None, 1, "no config.json here"),
    ],
)
def test_inspect_explains_what_it_cannot_read(
    content: object, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    assert call(monkeypatch, "inspect", str(tmp_path)) == code
    shown = capsys.readouterr().err
    assert shown.startswith("bloomery: ")
    assert message in shown
