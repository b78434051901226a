"""An export is only done when transformers agrees; every way to differ is provoked."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bloomery import artifact
from bloomery.config import build
from bloomery.errors import ArtifactError, ConfigError
from bloomery.evaluate import export, parity
from bloomery.evaluate.export import ExportConfig
from bloomery.model import hf
from bloomery.train.model_folder import open_model


def config(world: Any, **settings: Any) -> ExportConfig:
    defaults = {"num_prompts": 3, "max_new_tokens": 8, "prompts": world.prompts}
    return build(ExportConfig, {"model": world.model, **defaults, **settings})


def test_the_export_is_what_transformers_loads(tiny_world: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = export.run(config(tiny_world), tmp_path / "out")
    assert manifest.kind == "model"
    assert manifest.summary["logit_difference_max"] <= 1e-4
    assert manifest.summary["greedy_tokens_equal"] > 3
    assert manifest.summary["prompts_compared"] == 3
    folder = artifact.resolve(tmp_path / "out", "model")
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"


def test_half_precision_is_compared_after_rounding(tiny_world: Any, tmp_path: Path) -> None:
    settings = {"dtype": "bfloat16", "prompts": None, "num_prompts": 2}
    manifest = export.run(config(tiny_world, **settings), tmp_path / "out")
    assert manifest.summary["logit_difference_max"] <= 1e-4
    whole = sum(tensor.numel() for tensor in hf.load(tiny_world.model).state_dict().values())
    assert manifest.summary["files"]["model.safetensors"] < 3 * whole


def test_different_logits_are_an_error(tiny_world: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="logits differ from transformers' by up to .* must not be published"):
        export.run(config(tiny_world, max_logit_difference=1e-12), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_changed_weight_is_named(tiny_world: Any, tmp_path: Path) -> None:
    model = hf.load(tiny_world.model)
    with torch.no_grad():
        model.norm.weight[3] += 1
    hf.save(model, tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"1 tensors differ from .*, the first is norm\.weight"):
        parity.require_equal_weights(tiny_world.model, tmp_path / "model", torch.float32)


def test_a_lost_tensor_is_named(tiny_world: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hf.save(hf.load(tiny_world.model), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors[sorted(tensors)[1]]
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="transformers does not take every tensor as it is.*missing_keys"):
        parity.load_peer(tmp_path / "model")


def test_another_greedy_text_is_named(tiny_world: Any) -> None:
    model, peer = hf.load(tiny_world.model), parity.load_peer(tiny_world.model)
    with torch.no_grad():
        peer.lm_head.weight.copy_(peer.lm_head.weight.flip(0))
    with pytest.raises(ArtifactError, match="prompt 0: token 0 of the greedy text is"):
        parity.require_equal_greedy(model, peer, [[5, 6, 7]], [0], 4, 1e-4)


def test_a_tie_is_nobodys_error(tiny_world: Any) -> None:
    model, peer = hf.load(tiny_world.model), parity.load_peer(tiny_world.model)
    with torch.no_grad():
        peer.lm_head.weight.copy_(peer.lm_head.weight.flip(0))
    assert parity.require_equal_greedy(model, peer, [[5, 6, 7]], [0], 4, margin=100.0) == 0


def test_another_template_is_named(tiny_world: Any, tmp_path: Path) -> None:
    start = open_model(tiny_world.model)
    hf.save(hf.load(tiny_world.model), tmp_path / "model")
    start.tokenizer.save(tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|assistant|>", "<|user|>"))
    with pytest.raises(ArtifactError, match=r"transformers encodes '1\+1=' as .* do not survive the export"):
        parity.require_equal_tokenizer(tmp_path / "model", start.tokenizer, [[{"role": "user", "content": "1+1="}]])


def test_no_room_for_a_prompt(tiny_world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens: 62 leaves 2 tokens of the model's context for a prompt"):
        export.run(config(tiny_world, max_new_tokens=62), tmp_path / "out")


def test_check(tiny_world: Any, tmp_path: Path) -> None:
    assert export.check(config(tiny_world)) == {"dtype": "float32", "architecture": "NemotronHForCausalLM"}
    later = config(tiny_world).model_copy(update={"model": tmp_path / "later"})
    assert "no such folder" in export.check(later)["inputs"]
