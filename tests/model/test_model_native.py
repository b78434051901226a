"""The CPU kernels against their plain forms, and decoding that does not depend on who else is in the batch."""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_model_decoder import MODELS, SEQ, make, tokens

from bloomery.generate.sampling import RowSettings, SamplingParams, sample
from bloomery.model import native
from bloomery.model.activation import GATED, PLAIN
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.model.folded import to_unit_length
from bloomery.model.state import DecodeState
from bloomery.model.step import Step

needs_kernels = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler on this machine"
)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def plainly(monkeypatch, run):
    """What `run` gives without kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return run()


@needs_kernels
def test_the_kernels_build_here():
    assert native.library() is not None


@needs_kernels
@pytest.mark.parametrize("size", [1, 15, 16, 100])
def test_unit_length(monkeypatch, size):
    x = torch.randn(5, 2, size)
    expected = plainly(monkeypatch, lambda: to_unit_length(x, 1e-3))
    torch.testing.assert_close(native.unit_length(x, 1e-3), expected)


@needs_kernels
@pytest.mark.parametrize("name", ["silu", "relu2"])
def test_activations(name):
    x = torch.cat([torch.randn(3, 26) * 10, torch.tensor([[0.0, -200.0, 200.0, float("inf")] + [1.0] * 22])])
    squared = name == "relu2"
    torch.testing.assert_close(native.activate(x, False, squared), PLAIN[name](x.clone()))
    torch.testing.assert_close(native.activate(x, True, squared), GATED[name](*x.clone().chunk(2, -1)))
    assert native.activate(torch.full((1, 4), torch.nan), False, squared).isnan().all()


def config(head_dim: int, queries: int, window: int | None, rope: bool, norm: bool) -> ModelConfig:
    return ModelConfig(
        family="llama", pattern="*-", vocab_size=31, hidden_size=24, intermediate_size=20, mlp_gated=True,
        mlp_hidden_act="silu", num_attention_heads=2 * queries, num_key_value_heads=2, head_dim=head_dim,
        rope=RopeConfig() if rope else None, qk_norm=norm, sliding_window=window,
    )  # fmt: skip


@needs_kernels
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head_dim=st.sampled_from([2, 8, 16, 24, 48, 80]), queries=st.integers(1, 5), rope=st.booleans(),
    norm=st.booleans(), window=st.sampled_from([None, 3, 300]),
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=4), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention(monkeypatch, head_dim, queries, window, rope, norm, lengths, seed):
    torch.manual_seed(seed)
    decoder = Decoder(config(head_dim, queries, window, rope, norm)).eval()
    for parameter in decoder.parameters():
        parameter.uniform_(-1, 1)
    state = DecodeState.allocate(decoder.config, len(lengths), max(lengths) + 1)
    state.layers[0].keys.normal_()
    state.layers[0].values.normal_()
    state.lengths.copy_(torch.tensor(lengths))
    ids, other = torch.randint(31, (len(lengths), 1)), state.take(torch.arange(len(lengths)))
    found = Step(decoder)(ids, state)
    expected = plainly(monkeypatch, lambda: Step(decoder)(ids, other))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(
        (state.layers[0].keys, state.layers[0].values), vars(other.layers[0]).values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@needs_kernels
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.sampled_from([2, 4, 6]), head_dim=st.sampled_from([4, 16, 24, 40]), groups=st.sampled_from([1, 2]),
    size=st.integers(1, 20), taps=st.integers(2, 5), bias=st.booleans(),
    low=st.sampled_from([0.0, 0.01]),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), seed=st.integers(0, 99),
)  # fmt: skip
def test_prompts_and_steps_of_mamba(monkeypatch, heads, head_dim, groups, size, taps, bias, low, lengths, seed):
    """The kernel reads padded prompts in two pieces and decodes; the plain form is the chunked scan and the step."""
    torch.manual_seed(seed)
    decoder = Decoder(
        ModelConfig(
            pattern="M",
            vocab_size=31,
            hidden_size=24,
            mamba_num_heads=heads,
            mamba_head_dim=head_dim,
            ssm_state_size=size,
            n_groups=groups,
            conv_kernel=taps,
            use_conv_bias=bias,
            chunk_size=16,
            time_step_limit=(low, 1.0 if low else float("inf")),
        )
    ).eval()
    decoder.layers[0].mixer.norm.weight.uniform_(0.5, 2)
    ids, valid = torch.randint(31, (len(lengths), max(lengths) + 8)), torch.tensor(lengths)

    def read() -> list[torch.Tensor]:
        state = DecodeState.allocate(decoder.config, len(lengths), 100)
        decoder(ids[:, :3], state=state)
        hidden = decoder(ids[:, 3 : 3 + max(lengths)], state=state, lengths=valid)
        shown = [hidden[row, :length] for row, length in enumerate(lengths)]
        return [*shown, Step(decoder)(ids[:, -1:], state), state.layers[0].conv, state.layers[0].ssm]

    for found, expected in zip(read(), plainly(monkeypatch, read), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("vocab", [1, 63, 64, 1000])
def test_draws(monkeypatch, vocab):
    params = [SamplingParams(temperature=t) for t in (0.0, 0.3, 1.0, 5.0)] * 50
    logits, uniform = torch.randn(len(params), vocab) * 4, torch.rand(len(params), 1, dtype=torch.float64)
    logits[1::7, 1::2] = -torch.inf
    rows = RowSettings.of(params, torch.device("cpu"))
    found = sample(logits.clone(), rows, uniform)
    expected = plainly(monkeypatch, lambda: sample(logits.clone(), rows, uniform))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_damaged_row_is_seen(bad):
    logits = torch.zeros(2, 70)
    logits[1, 3] = bad
    rows = RowSettings.of([SamplingParams()], torch.device("cpu"))
    logprobs = sample(logits, rows, torch.full((2, 1), 0.5, dtype=torch.float64))[1]
    assert logprobs.isnan().flatten().tolist() == [False, True]


@needs_kernels
def test_threads_change_nothing():
    decoder, ids = make("dense"), tokens(3)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        state = DecodeState.allocate(decoder.config, 3, SEQ)
        decoder(ids[:, :5], state=state)
        results.append(Step(decoder)(ids[:, 5:6], state))
    torch.set_num_threads(before)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kernels", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_depend_on_the_others(monkeypatch, name, kernels):
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    decoder, count = make(name), 19
    ids, lengths = tokens(count), torch.arange(count) % 11 + 1
    state = DecodeState.allocate(decoder.config, count, SEQ)
    decoder(ids[:, :11], state=state, lengths=lengths)
    step, everyone = Step(decoder, deterministic=True), torch.arange(count)
    together = step(ids[:, 11:12], state.take(everyone))
    for seed in range(6):
        some = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: 1 + 3 * seed]
        assert torch.equal(step(ids[some, 11:12], state.take(some)), together[some])


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "install g++" in capsys.readouterr().err
        assert not native.serves(torch.ones(1))
        monkeypatch.setenv("BLOOMERY_NATIVE", "0")
        native.library.cache_clear()
        assert native.library() is None
        assert capsys.readouterr().err == ""
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch, capsys, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'unknown option -march=native' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "unknown option -march=native" in capsys.readouterr().err
    finally:
        native.library.cache_clear()


@needs_kernels
def test_training_and_other_types_take_the_plain_form():
    assert native.serves(torch.ones(1))
    assert not native.serves(torch.ones(1, dtype=torch.bfloat16))
    with torch.enable_grad():
        assert not native.serves(torch.ones(1))
