"""Memory of sequences: growing, shrinking, and looking at what a row holds."""

import pytest
import torch

from bloomery.model.config import ModelConfig
from bloomery.model.state import DecodeState

CONFIG = ModelConfig(
    pattern="M*-*", vocab_size=50, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2,
    head_dim=4, mamba_num_heads=2, mamba_head_dim=4, ssm_state_size=4,
)  # fmt: skip


def filled(rows, tokens, lengths):
    torch.manual_seed(0)
    state = DecodeState.allocate(CONFIG, rows, tokens)
    for layer in state.layers:
        for buffer in vars(layer).values() if layer else ():
            buffer.normal_()
    state.lengths += torch.tensor(lengths)
    return state


def held(state, row):
    return [view.clone() for view in state.span(row, 0, int(state.lengths[row])) + state.memory(row)]


@pytest.mark.parametrize(("rows", "tokens"), [(5, 30), (5, 7), (2, 30), (2, 5), (3, 9)])
def test_rows_keep_what_they_hold_when_memory_changes_size(rows, tokens):
    state = filled(3, 9, [4, 5, 1])
    before = [held(state, row) for row in range(min(rows, 3))]
    state.resize(rows, tokens)
    assert (state.batch, state.max_tokens) == (rows, tokens)
    assert state.nbytes == CONFIG.cache_bytes(rows, tokens, torch.float32)
    assert state.lengths.tolist() == ([4, 5, 1] + [0] * rows)[:rows]
    for row, expected in enumerate(before):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(held(state, row), expected, strict=True))
    for row in range(3, rows):  # free rows have an empty memory
        assert all(not view.any() for view in state.memory(row))


def test_memory_can_begin_with_nothing():
    state = DecodeState.allocate(CONFIG, 0, 0)
    assert state.nbytes == 0
    state.resize(2, 8)
    assert state.nbytes == CONFIG.cache_bytes(2, 8, torch.float32)


def test_tokens_are_not_cut_off():
    state = filled(3, 9, [4, 5, 8])
    with pytest.raises(ValueError, match="a row holds 5 tokens, 4 do not hold it; keep at least 5"):
        state.resize(2, 4)


def test_a_span_is_a_part_of_a_row():
    state = filled(2, 9, [9, 9])
    keys, values, *_ = state.span(1, 3, 7)
    assert torch.equal(keys, state.layers[1].keys[1, :, :, 3:7])
    assert torch.equal(values, state.layers[1].values[1, :, 3:7])
    assert len(state.span(1, 3, 7)) == 4  # two attention layers
    assert [view.shape for view in state.memory(0)] == [(3, 16), (1, 4, 8)]
