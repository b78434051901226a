"""FP8 applied to decoders: which layers, what is measured, what is refused; training learns and resumes exactly."""

import json
import math

import pytest
import torch
from tiny_training import loop

from bloomery import config as configs
from bloomery.artifact import Output
from bloomery.config import Config, Field
from bloomery.errors import ConfigError, DivergenceError
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.report.curves import PANELS
from bloomery.train.fp8 import Fp8, Fp8Config, Plan, summary
from bloomery.train.loop import LoopConfig, TrainState, steps
from bloomery.train.losses import next_token
from bloomery.train.optim import adamw
from bloomery.train.run import resumable, what_runs_in_fp8
from bloomery.train.validation import validation_losses

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CPU = torch.device("cpu")
SIZES = {
    "pattern": "M-*E-M", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "mamba_num_heads": 2, "mamba_head_dim": 16, "ssm_state_size": 15,
    "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip


def decoder(**sizes) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(**{**SIZES, **sizes}))


def batches(position: int, rows: int = 4, seq: int = 12):
    """Rows that count upwards, as a function of the position."""
    while True:
        start = torch.randint(64, (rows, 1), generator=torch.Generator().manual_seed(position))
        ids = (start + torch.arange(seq + 1)) % 64
        yield [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}]
        position += rows


def fp8_loop(**settings) -> LoopConfig:
    fp8 = {"high_precision_layers": 1, "measure_every_steps": 2, **settings.pop("fp8", {})}
    return loop(precision="fp8", fp8=Fp8Config(**fp8), **settings)


def chosen(**settings) -> set[str]:
    return set(Plan.of(decoder(), Fp8Config(**settings)).chosen)


def test_the_layers_in_between_and_nothing_else():
    middle = {
        "layers.2.mixer.q_proj", "layers.2.mixer.k_proj", "layers.2.mixer.v_proj", "layers.2.mixer.o_proj",
        "layers.3.mixer.shared_experts.up_proj", "layers.3.mixer.shared_experts.down_proj",
    }  # fmt: skip
    assert chosen() == middle
    outer = {f"layers.{number}.mixer.{name}" for number in (1, 4) for name in ("up_proj", "down_proj")}
    assert chosen(high_precision_layers=1) == middle | outer
    mamba = {f"layers.{number}.mixer.{name}" for number in (0, 5) for name in ("in_proj", "out_proj")}
    assert chosen(high_precision_layers=0) == middle | outer | mamba
    assert chosen(keep=("layers.2.mixer.o_proj",)) == middle - {"layers.2.mixer.o_proj"}


def test_a_size_that_is_no_multiple_of_16_stays_in_bf16_and_is_named():
    """in_proj has 2·32 + 2·15 + 2 = 96 rows; with 16 states 98."""
    model = decoder(ssm_state_size=16)
    plan = Plan.of(model, Fp8Config(high_precision_layers=0))
    assert plan.misfits == ["layers.0.mixer.in_proj 32×98", "layers.5.mixer.in_proj 32×98"]
    assert plan.describe(Fp8Config(), CPU) == (
        "12 of 14 linear layers in FP8 (e4m3 forward, e5m2 gradients; emulated, for this cpu cannot multiply them: "
        "slower); bf16: 0 at the ends, not a multiple of 16: layers.0.mixer.in_proj 32×98, layers.5.mixer.in_proj 32×98"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"high_precision_layers": 3}, "precision: fp8 would change nothing: of 14 linear layers 14 are in the"),
        ({"keep": ("layers.9.mixer.o_proj",)}, r"fp8\.keep: layers\.9\.mixer\.o_proj is no linear layer.*layers\.0"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Plan.of(decoder(), Fp8Config(**settings))


def test_settings_without_effect_are_refused():
    with pytest.raises(ConfigError, match="fp8: without effect under precision auto; set precision: fp8"):
        configs.build(LoopConfig, {"max_steps": 1, "fp8": {"gradient": "e4m3"}})


def test_installed_is_in_force_inside_only_and_names_stay():
    model = decoder()
    names, weight = list(model.state_dict()), model.layers[2].mixer.q_proj.weight
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        before = model(ids)
        with Fp8(model, Fp8Config()).installed():
            assert list(model.state_dict()) == names
            assert model.layers[2].mixer.q_proj.weight is weight
            inside = model(ids)
        assert torch.equal(model(ids), before)
        with Fp8(model, None).installed():
            assert torch.equal(model(ids), before)
    assert 1e-4 < (inside - before).norm() / before.norm() < 0.2


def test_it_learns_and_measures():
    config = fp8_loop(max_steps=60, batch_size=4, fp8={"measure_every_steps": 20})
    model = decoder()
    done = list(steps(TrainState(model, adamw(model, config)), batches(0), next_token, config))
    assert done[0].loss == pytest.approx(math.log(64), rel=0.1)
    assert done[-1].loss < 0.5 * done[0].loss
    assert [step.step for step in done if step.fp8] == [20, 40, 60]
    found = done[-1].fp8
    assert set(found) == chosen(high_precision_layers=1)
    assert set(found["layers.1.mixer.up_proj"]) == {"X", "W", "dY"}
    assert found["layers.1.mixer.up_proj"]["X"]["saturated"] == 0
    assert all(0 < role["amax"] < 1e6 for layer in found.values() for role in layer.values())
    means = summary(found)
    assert set(means) == {f"fp8_{kind}/{role}" for kind in ("saturated", "flushed") for role in ("X", "W", "dY")}
    assert all(any(panel.holds(name) for panel in PANELS) for name in means)


@pytest.mark.parametrize("order", [1, -1])
def test_the_measured_amax_is_the_largest_over_micro_batches(order):
    config = fp8_loop(max_steps=1, fp8={"measure_every_steps": 1})
    whole, parts = decoder(), decoder()
    batch = next(batches(0))
    split = [{name: value[row : row + 1] for name, value in batch[0].items()} for row in range(4)][::order]
    (one,) = steps(TrainState(whole, adamw(whole, config)), iter([batch]), next_token, config)
    (many,) = steps(TrainState(parts, adamw(parts, config)), iter([split]), next_token, config)
    for role in ("X", "W"):
        name = "layers.1.mixer.up_proj"
        assert one.fp8[name][role]["amax"] == pytest.approx(many.fp8[name][role]["amax"], rel=1e-6)


def test_validation_is_in_the_precision_of_training():
    model, batch = decoder(), next(batches(0))
    losses = [
        validation_losses(model, batch, [], each)["validation_loss"] for each in (fp8_loop(), loop(precision="bf16"))
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert validation_losses(model, [], [], fp8_loop()) == {}


@pytest.mark.parametrize("role", ["X", "W", "dY"])
def test_what_is_not_finite_is_named_and_no_weight_changes(role):
    config = fp8_loop(max_steps=1)
    model = decoder()
    state = TrainState(model, adamw(model, config))
    up = model.layers[1].mixer.up_proj
    if role == "W":
        up.weight.data[0, 0] = math.inf
    elif role == "X":
        model.layers[1].norm.weight.data[0] = math.nan
    else:
        model.layers[1].mixer.up_proj.register_full_backward_pre_hook(lambda _, dy: (dy[0] * math.inf,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = rf"step 1, sequences from 0: the largest number of {role} of layers\.1\.mixer\.up_proj is (nan|inf), so"
    with pytest.raises(DivergenceError, match=expected):
        next(steps(state, batches(0), next_token, config))
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


def test_a_forward_that_goes_around_its_layers_is_noticed():
    config = fp8_loop(max_steps=1)
    model = decoder()
    model.layers[1].mixer.forward = lambda x, *_: x
    with pytest.raises(AssertionError, match=r"goes around.*layers\.1\.mixer\.up_proj"):
        next(steps(TrainState(model, adamw(model, config)), batches(0), next_token, config))


def test_activation_checkpointing_changes_nothing():
    losses = []
    for recompute in (False, True):
        model, config = decoder(pattern="-*-*-"), fp8_loop(max_steps=3, activation_checkpointing=recompute)
        losses.append([s.loss for s in steps(TrainState(model, adamw(model, config)), batches(0), next_token, config)])
    assert losses[0] == losses[1]


class StageConfig(Config):
    """Settings of the stage below."""

    loop: LoopConfig = Field(description="how to train")


def train(path, config: LoopConfig, stop_after: int = 99) -> TrainState:
    model = decoder()
    state = TrainState(model, adamw(model, config))
    with Output(path, "tiny", StageConfig(loop=config)) as output:
        for step in resumable(output, state, batches, next_token, config):
            if step.step == stop_after:
                raise KeyboardInterrupt
    return state


def test_a_resumed_run_is_the_same_run(tmp_path, capfd):
    config = fp8_loop(max_steps=8, checkpoint_every_steps=3)
    whole = train(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", config, stop_after=5)
    resumed = train(tmp_path / "cut", config)
    for (name, ours), theirs in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    rows = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0] if "fp8" in row] == [2, 4, 6, 8]
    assert "tiny  fp8: 10 of 14 linear layers in FP8" in "".join(capfd.readouterr())


def test_check_says_it_from_the_sizes():
    config = ModelConfig(**SIZES)
    assert what_runs_in_fp8(config, fp8_loop(), CPU)["fp8"].startswith("10 of 14 linear layers in FP8")
    assert what_runs_in_fp8(config, loop(), CPU) == {}
