"""A hybrid whose sequences are shared among ranks, in every mode: loss and every gradient are those of one process."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from distributed import run
from exact_training import in_float64

from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.apply import parallelize
from bloomery.parallel.context import ContextModes, check_modes
from bloomery.parallel.mapping import Mapping
from bloomery.train.losses import Loss

CONFIG = ModelConfig(
    pattern="M*-M*", vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    qk_norm=True, rope=RopeConfig(), intermediate_size=24, mamba_num_heads=8, mamba_head_dim=4, ssm_state_size=4,
    n_groups=2, chunk_size=4, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
MODES = [
    ContextModes(attention=attention, mamba=mamba, layout=layout)
    for attention, mamba, layout in itertools.product(
        ("allgather", "ring", "heads"), ("state", "heads"), ("zigzag", "contiguous")
    )
]


def _decoder(window=None):
    torch.manual_seed(0)
    return Decoder(CONFIG.model_copy(update={"sliding_window": window})).double()


def _batch(documents, seq=32):
    draw = torch.Generator().manual_seed(3)
    batch = {"input_ids": torch.randint(64, (2, seq), generator=draw)}
    batch["labels"] = torch.randint(64, (2, seq), generator=draw)
    if documents:
        batch["segment_ids"] = (torch.arange(seq) >= torch.tensor([[5], [seq // 2 + 3]])).long()
    return batch


def _objective(model, batch, recompute=False):
    inputs = {name: batch.get(name) for name in ("segment_ids", "position_ids")}
    logits = model.lm_head(model(batch["input_ids"], **inputs, checkpoint_activations=recompute))
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none", ignore_index=-100)
    return Loss(losses.sum(), (batch["labels"] != -100).sum(), {})


def _recomputing(model, batch):
    return _objective(model, batch, recompute=True)


def _alone(batches, window):
    with in_float64():
        model = _decoder(window)
        losses = [_objective(model, batch).sum for batch in batches]
        sum(losses).backward()
    return float(sum(losses).detach()), {name: p.grad for name, p in model.named_parameters()}


def _together(mapping, cases):
    found = []
    for modes, batches, window, recompute in cases:
        with in_float64():
            parallel = parallelize(_decoder(window), mapping, modes)
            parts = [parallel.split(batch) for batch in batches]
            losses = parallel.forward_backward(parts, _recomputing if recompute else _objective)
            total = parallel.sum(sum((loss.sum for loss in losses), torch.zeros((), dtype=torch.float64)))
            found.append((float(total), {name: full.clone() for name, full in parallel.full_gradients()}))
    return found


def _compare(mapping, cases):
    results = run(mapping.world_size, _together, mapping, cases)[0]
    for (modes, batches, window, _), (loss, gradients) in zip(cases, results, strict=True):
        expected_loss, expected = _alone(batches, window)
        assert loss == pytest.approx(expected_loss, rel=1e-9)
        assert gradients.keys() == expected.keys()
        for name, value in expected.items():
            limit = 1e-9 * float(value.abs().max())
            torch.testing.assert_close(
                gradients[name], value, rtol=1e-9, atol=limit, msg=lambda m, n=name, o=modes: f"{n}, {o}: {m}"
            )


def test_two_ranks_share_sequences_in_every_mode():
    several = [_batch(True), _batch(False)]  # of one pass the documents are kept, of the next they are others
    _compare(Mapping(context=2), [(modes, several, None, number % 2) for number, modes in enumerate(MODES)])


def test_a_window_and_a_length_that_needs_padding():
    cases = [(ContextModes(attention=a), [_batch(d, seq=30)], 5, False) for a in ("ring", "heads") for d in (0, 1)]
    _compare(Mapping(context=2), cases)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["allgather", "ring", "heads"])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("degrees", [{"context": 4}, {"context": 2, "tensor": 2}, {"context": 2, "pipeline": 2}])
def test_four_ranks_share_sequences_in_every_mode(degrees, window, attention):
    modes = [m for m in MODES if m.attention == attention and (m.mamba == "state" or "tensor" not in degrees)]
    _compare(Mapping(**degrees), [(mode, [_batch(True), _batch(True)], window, False) for mode in modes])


def _refused(modes):
    odd = CONFIG.model_copy(update={"num_attention_heads": 3, "num_key_value_heads": 3})
    with pytest.raises(ConfigError) as caught:
        parallelize(Decoder(odd), Mapping(context=2), modes)
    return str(caught.value)


def test_heads_that_cannot_be_shared_are_refused_with_what_would_do():
    by_heads = ContextModes(attention="heads")
    with pytest.raises(ConfigError, match=r"^context\.attention: heads: 4 heads over 3 context ranks.*; choose allg"):
        check_modes(CONFIG, by_heads, 3, where="context")
    with pytest.raises(ConfigError, match=r"attention: heads: 2 heads over 4 context ranks.*allgather or ring"):
        check_modes(CONFIG, by_heads, 4, tensor=2)
    twelve = CONFIG.model_copy(update={"num_attention_heads": 12, "num_key_value_heads": 6})
    with pytest.raises(ConfigError, match=r"6 key or state groups over 4 .* a multiple or a divisor of the ranks"):
        check_modes(twelve, by_heads, 4)
    with pytest.raises(ConfigError, match=r"mamba: heads: 8 heads over 16 context ranks.*; choose state"):
        check_modes(CONFIG, ContextModes(mamba="heads"), 16)
    for message in run(2, _refused, by_heads):
        assert message.startswith("attention: heads: 3 heads over 2 context ranks")


def _decoding():
    model = parallelize(_decoder(), Mapping(context=2)).model
    with pytest.raises(ValueError, match="a model shared among ranks does not decode"):
        model(torch.zeros(1, 8, dtype=torch.int64), lengths=torch.tensor([3]))
    return True


def test_a_shared_model_does_not_decode():
    assert all(run(2, _decoding))
