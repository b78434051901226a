"""Bytes of a decoding step against published tables and against the buffers themselves."""

import math
from dataclasses import fields

import pytest
import torch
from test_model_matched import E1, H8B
from torch.utils._python_dispatch import TorchDispatchMode

from bloomery.model import native, roofline
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.model.matched import matched_transformer
from bloomery.model.state import DecodeState
from bloomery.model.step import Step

E1_PEER = matched_transformer(E1, blocks=16)
T8B = matched_transformer(H8B)
MIB = 2**20


@pytest.mark.parametrize(
    ("batch", "tokens", "ratio"),
    [(1, 512, 1.05), (1, 4096, 1.7), (4, 4096, 2.9), (4, 16384, 5.3), (1, 65536, 5.6), (8, 8192, 5.0)],
)
def test_the_small_pairs_ratios(batch, tokens, ratio):
    assert roofline.predicted_ratio(E1, E1_PEER, batch, tokens) == pytest.approx(ratio, rel=0.013)


def test_the_small_pairs_parts():
    hybrid, peer = (roofline.step_bytes(config, 4, 1000) for config in (E1, E1_PEER))
    assert (hybrid.key_values, peer.key_values) == (4 * 1000 * 2048, 4 * 1000 * 16384)
    assert hybrid.states == 4 * 2 * 12 * (16 * 32 * 64 + 1024 * 3) * 4  # read and written
    assert peer.states == 0
    assert hybrid.weights == 4 * (E1.count_parameters() - 8192 * 256)
    assert hybrid.total == hybrid.weights + hybrid.key_values + hybrid.states


def test_cache_of_the_8b():
    assert roofline.key_value_bytes(T8B, torch.bfloat16) == 131_072
    assert roofline.key_value_bytes(H8B, torch.bfloat16) == 16_384
    assert roofline.state_bytes(H8B, torch.bfloat16) / MIB == pytest.approx(97.4, abs=0.05)
    assert roofline.equal_memory(H8B, T8B, torch.bfloat16) == pytest.approx(890, abs=1)
    assert T8B.cache_bytes(1, 65_536, torch.bfloat16) == 8 * 1024 * MIB
    assert H8B.cache_bytes(1, 65_536, torch.bfloat16) / MIB == pytest.approx(1.10 * 1024, rel=0.005)


def test_bytes_per_token_are_those_of_the_buffers():
    decoder = Decoder(E1.model_copy(update={"vocab_size": 16, "pattern": "M*-M"}))
    buffers = [
        sum(
            getattr(cache, field.name).nbytes
            for cache in DecodeState.allocate(decoder.config, 1, tokens).layers
            if cache is not None
            for field in fields(cache)
        )
        for tokens in (0, 1)
    ]
    assert roofline.state_bytes(decoder.config) == buffers[0]
    assert roofline.key_value_bytes(decoder.config) == buffers[1] - buffers[0]


class LargestNew(TorchDispatchMode):
    """The bytes of the largest tensor that is made, views of known memory aside."""

    def __init__(self, known: DecodeState):
        super().__init__()
        self.bytes = 0
        self._known = {
            getattr(cache, field.name).untyped_storage().data_ptr()
            for cache in known.layers
            if cache is not None
            for field in fields(cache)
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self._known:
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kernel", [True, False])
def test_a_step_copies_no_keys_and_repeats_none_for_the_query_heads(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
    decoder = Decoder(E1_PEER.model_copy(update={"vocab_size": 16, "pattern": "*-", "intermediate_size": 8}))
    state = DecodeState.allocate(decoder.config, 2, 4200)
    state.lengths.fill_(4096)
    step = Step(decoder)
    with LargestNew(state) as seen:
        step(torch.zeros(2, 1, dtype=torch.int64), state)
    scores = 2 * 8 * 4097 * 4
    assert 0 < seen.bytes <= scores  # a copy of the keys would be 16 times as large
    assert scores * 16 < state.layers[0].keys.nbytes * 1.1


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_crossover_is_where_the_bytes_have_that_ratio(batch, ratio):
    tokens = roofline.crossover(E1, E1_PEER, batch, ratio)
    assert roofline.predicted_ratio(E1, E1_PEER, batch, round(tokens)) == pytest.approx(ratio, rel=3e-3)
    assert roofline.predicted_ratio(E1, E1_PEER, batch, round(tokens) + 100) > ratio


def test_crossover_at_the_ends():
    assert roofline.crossover(E1, E1_PEER, 1, ratio=8.0) == math.inf  # the caches grow in the ratio 8
    assert roofline.crossover(E1_PEER, E1_PEER, 1) == 0
    assert roofline.crossover(E1_PEER, E1, 1, ratio=2.0) == math.inf
    assert roofline.equal_memory(E1_PEER, E1_PEER) == 0


def test_a_window_bounds_what_is_read():
    windowed = E1_PEER.model_copy(update={"sliding_window": 100})
    assert roofline.step_bytes(windowed, 2, 5000).key_values == 2 * 100 * 16384


def test_only_chosen_experts_are_read():
    mixture = ModelConfig(
        pattern="*E", vocab_size=64, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, tie_word_embeddings=True,
    )  # fmt: skip
    one = 2 * 32 * 48
    rest = mixture.count_parameters() - 8 * one
    read = [roofline.step_bytes(mixture, batch, 0, torch.bfloat16).weights / 2 for batch in (1, 2, 10_000)]
    assert read == [rest + 2 * one, rest + 8 * one * (1 - 0.75**2), rest + 8 * one]


def test_largest_batch_fills_the_budget():
    assert roofline.largest_batch(E1_PEER, 16_384, 512 * MIB) == 2
    found = roofline.largest_batch(E1, 16_384, 512 * MIB)
    assert E1.cache_bytes(found, 16_384, torch.float32) <= 512 * MIB < E1.cache_bytes(found + 1, 16_384, torch.float32)


def test_speed_follows_bandwidth():
    total = roofline.step_bytes(E1, 4, 100).total
    assert roofline.tokens_per_second(E1, 4, 100, bandwidth=total) == 4
    assert roofline.read_bandwidth(size=1 << 20, repeats=1) > 1e6


def test_summary_for_a_model_folder():
    found = roofline.against_transformer(H8B)
    assert (found["transformer_blocks"], found["transformer_intermediate_size"]) == (32, 21504)
    assert found["most_times_faster"] == 8
    assert found["less_memory_from_tokens"] < found["faster_from_tokens"] < 4096
