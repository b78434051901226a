"""Scheduling on a fake decoder whose every answer can be computed by hand; the oracles run on real ones below."""

import pytest
import torch
from torch import nn

from bloomery.errors import ConfigError, DivergenceError
from bloomery.generate import Completion, Engine, Request, SamplingParams
from bloomery.generate import engine as engine_module
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.model.state import DecodeState
from bloomery.model.step import Step

VOCAB = 50
END = 49


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose far more to waiting threads than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Adder(nn.Module):
    """The likeliest next token is the sum of all tokens so far, modulo 50. The sum lives in the Mamba memory, so a row
    that was not cleaned, or was read from the wrong place, continues with the wrong number."""

    config = ModelConfig(
        pattern="M", vocab_size=VOCAB, hidden_size=VOCAB, mamba_num_heads=1, mamba_head_dim=1, ssm_state_size=1
    )

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(VOCAB, VOCAB, bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.calls = []

    def forward(self, input_ids, state, lengths=None, only_last=False):
        self.calls.append(tuple(input_ids.shape))
        batch, seq = input_ids.shape
        valid = torch.full((batch,), seq) if lengths is None else lengths
        tokens = input_ids * (torch.arange(seq) < valid[:, None])
        memory = state.layers[0].ssm[:, 0, 0, 0]
        sums = memory[:, None] + tokens.cumsum(1)
        memory.copy_(sums[:, -1])
        state.lengths += valid
        hidden = nn.functional.one_hot(sums.long() % VOCAB, VOCAB).float() * 100
        return hidden[:, -1:] if only_last else hidden  # padding adds nothing to the sum


def expected(prompt, limit, stop=()):
    total, out = sum(prompt), []
    while len(out) < limit:
        out.append(total % VOCAB)
        total += out[-1]
        if out[-1] in stop:
            break
    return out


def greedy(limit, **settings):
    return SamplingParams(max_new_tokens=limit, temperature=0, **settings)


def test_completions_come_in_order_whatever_finishes_first():
    requests = [Request([i, 3, 2 * i], greedy(1 + (7 * i) % 9)) for i in range(23)]
    completions = Engine(Adder(), max_batch=4, max_tokens=16).generate(requests)
    assert [c.token_ids for c in completions] == [expected(r.prompt_ids, r.params.max_new_tokens) for r in requests]
    assert {c.finish_reason for c in completions} == {"length"}


def test_stream_yields_each_as_it_finishes():
    requests = [Request([1], greedy(limit)) for limit in (9, 2, 5)]
    order = [index for index, _ in Engine(Adder(), max_batch=3, max_tokens=16).stream(requests)]
    assert order == [1, 2, 0]


def test_rows_are_refilled_at_once_and_the_batch_shrinks_at_the_end():
    model = Adder()
    requests = [Request([i + 1], greedy(3 if i % 2 else 6)) for i in range(6)]
    Engine(model, max_batch=2, max_tokens=16).generate(requests)
    widths = [batch for batch, _ in model.calls]
    # 27 tokens, 6 of them drawn from the prompts' logits; two rows at every step but the last ones.
    decoding = sum(widths) - 6
    assert decoding == 27 - 6
    assert max(widths) == 2
    assert widths[-1] == 1


def test_prompts_of_many_lengths_in_bounded_groups():
    model = Adder()
    requests = [Request([1] * length, greedy(2)) for length in (9, 1, 5, 5, 2, 8, 3)]
    completions = Engine(model, max_batch=8, max_tokens=16, prefill_tokens=12).generate(requests)
    assert [c.token_ids for c in completions] == [expected(r.prompt_ids, 2) for r in requests]
    prefills = [(batch, seq) for batch, seq in model.calls if seq > 1]
    assert all(batch * seq <= 12 for batch, seq in prefills)
    assert len(prefills) == 4  # {1, 2, 3}, {5}, {8}, {9} after sharing the two prompts of length 5


def test_samples_of_one_prompt_share_one_prefill_even_when_they_wait():
    model = Adder()
    requests = [Request([7, 8, 9], greedy(2 + i % 3)) for i in range(10)] + [Request([5, 5, 5], greedy(2))] * 2
    completions = Engine(model, max_batch=3, max_tokens=16).generate(requests)
    assert [c.token_ids for c in completions] == [expected(r.prompt_ids, r.params.max_new_tokens) for r in requests]
    assert [shape for shape in model.calls if shape[1] == 3] == [(1, 3), (1, 3)]


def test_interleaved_samples_of_several_prompts_share_too():
    model = Adder()
    requests = [Request([i % 3 + 1, 4], greedy(3 + i % 2)) for i in range(12)]
    completions = Engine(model, max_batch=2, max_tokens=16).generate(requests)
    assert [c.token_ids for c in completions] == [expected(r.prompt_ids, r.params.max_new_tokens) for r in requests]
    assert sum(batch for batch, seq in model.calls if seq == 2) == 3


def test_stop_tokens_end_and_stay():
    requests = [Request([END], greedy(5, stop_token_ids=(END,))), Request([3], greedy(8, stop_token_ids=(1, 24)))]
    first, second = Engine(Adder(), max_batch=2, max_tokens=16).generate(requests)
    assert (first.token_ids, first.finish_reason) == ([END], "stop")
    assert (second.token_ids, second.finish_reason) == ([3, 6, 12, 24], "stop")


def test_stop_beats_length_on_the_last_token():
    (only,) = Engine(Adder(), max_batch=1, max_tokens=8).generate([Request([3], greedy(2, stop_token_ids=(6,)))])
    assert only.finish_reason == "stop"


def letters(ids):
    return "".join(chr(ord("A") + i) for i in ids)


def test_stop_strings_cut_the_text_and_keep_the_tokens():
    params = greedy(6, stop=("GM",))
    completion, other = Engine(Adder(), 2, 16, decode=letters).generate([Request([3], params), Request([3], greedy(2))])
    assert completion.token_ids == [3, 6, 12]  # D G M
    assert len(completion.logprobs) == 3
    assert (completion.text, completion.finish_reason) == ("D", "stop")
    assert (other.text, other.finish_reason) == ("DG", "length")


def test_text_leaves_the_stop_token_out():
    (completion,) = Engine(Adder(), 1, 16, decode=letters).generate([Request([3], greedy(6, stop_token_ids=(12,)))])
    assert (completion.token_ids, completion.text) == ([3, 6, 12], "DG")


def test_no_requests():
    assert Engine(Adder(), 2, 16).generate([]) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], greedy(2)), "request 1: the prompt is empty"),
        (Request([1] * 10, greedy(7)), "request 1: a prompt of 10 tokens and max_new_tokens 7 .* max_tokens 16"),
        (Request([1, VOCAB], greedy(2)), "request 1: token 50 is outside the model's vocabulary of 50"),
        (Request([1], greedy(2, stop_token_ids=(77,))), "request 1: token 77"),
        (Request([1], greedy(2, stop=("x",))), "request 1: stop strings need text; give the engine a decode"),
    ],
)
def test_requests_that_cannot_run_are_named_before_anything_is_generated(request_, message):
    model = Adder()
    with pytest.raises(ConfigError, match=message):
        Engine(model, 2, 16).stream([Request([1], greedy(2)), request_])
    assert model.calls == []


def test_a_prompt_that_just_fits():
    (completion,) = Engine(Adder(), 2, 16).generate([Request([1] * 10, greedy(6))])
    assert completion.token_ids == expected([1] * 10, 6)


@pytest.mark.parametrize("name", ["max_batch", "max_tokens", "prefill_tokens"])
def test_engine_sizes_are_checked(name):
    with pytest.raises(ConfigError, match=f"{name}: 0; expected at least 1"):
        Engine(Adder(), **{"max_batch": 2, "max_tokens": 8, name: 0})


def test_sync_aborts_what_runs_and_keeps_what_waits():
    model = Adder()
    engine = Engine(model, max_batch=2, max_tokens=16)
    results = {}
    for index, completion in engine.stream([Request([i], greedy(2 if i == 0 else 5)) for i in range(4)]):
        results[index] = completion
        if index == 0:
            engine.sync()
    assert [results[i].finish_reason for i in range(4)] == ["length", "abort", "length", "length"]
    assert [results[i].weight_version for i in range(4)] == [0, 0, 1, 1]
    assert results[1].token_ids == expected([1], 5)[: len(results[1].token_ids)]
    assert results[3].token_ids == expected([3], 5)
    assert engine.generate([Request([1], greedy(1))])[0].weight_version == 1


def test_after_sync_a_kept_prompt_is_read_again():
    model = Adder()
    engine = Engine(model, max_batch=1, max_tokens=16)
    for count, _ in enumerate(engine.stream([Request([4, 4], greedy(2))] * 3)):
        if count == 0:
            engine.sync()
    assert [shape for shape in model.calls if shape[1] == 2] == [(1, 2), (1, 2)]


def test_an_abandoned_stream_leaves_nothing_behind():
    model = Adder()
    engine = Engine(model, max_batch=2, max_tokens=16)
    model.train()
    stream = engine.stream([Request([i], greedy(1 + i)) for i in range(6)])
    next(stream)
    stream.close()
    assert model.training
    requests = [Request([i], greedy(4)) for i in range(5)]
    assert [c.token_ids for c in engine.generate(requests)] == [expected([i], 4) for i in range(5)]


def test_two_open_streams_do_not_share_rows():
    engine = Engine(Adder(), max_batch=2, max_tokens=16)
    requests = [[Request([base + i], greedy(3 + i)) for i in range(4)] for base in (0, 10)]
    results = ({}, {})
    for pair in zip(*(engine.stream(each) for each in requests), strict=True):
        for result, (index, completion) in zip(results, pair, strict=True):
            result[index] = completion.token_ids
    assert results[1] == {i: expected([10 + i], 3 + i) for i in range(4)}


@pytest.mark.parametrize("change", [lambda p: p.mul_(-1), lambda p: p.data.mul_(-1)], ids=["in place", "through .data"])
@torch.no_grad()
def test_changed_weights_are_used_even_without_sync(change):
    torch.manual_seed(0)
    decoder = Decoder(hybrid())
    engine, requests = Engine(decoder, 2, 40), [Request([1, 2, 3], greedy(20))]
    before = engine.generate(requests)[0].token_ids
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            change(parameter)
    after = engine.generate(requests)[0].token_ids
    assert after != before
    assert after == Engine(decoder, 2, 40).generate(requests)[0].token_ids


@pytest.mark.parametrize(("training", "made"), [(False, [1, 1, 2, 3]), (True, [1, 2, 3, 4])])
def test_prepared_weights_are_kept_between_calls_unless_they_change_or_training_goes_on(training, made, monkeypatch):
    torch.manual_seed(0)
    decoder, steps = Decoder(hybrid()).train(training), []
    monkeypatch.setattr(engine_module, "prepared", lambda *given: steps.append(1) or Step(*given))
    engine, counts = Engine(decoder, 2, 40), []
    for change in (None, None, engine.sync, lambda: decoder.norm.weight.data.mul_(2)):
        if change:
            change()
        engine.generate([Request([1, 2, 3], greedy(4))])
        counts.append(len(steps))
    assert counts == made


def test_weights_that_are_not_numbers_stop_the_run():
    model = Adder()
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(DivergenceError, match="request 0: the model's logits for token 1 are not finite"):
        Engine(model, 1, 16).generate([Request([1], greedy(3))])


def hybrid():
    return ModelConfig(
        pattern="M-M*-M-", vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2,
        chunk_size=8,
    )  # fmt: skip


def dense():
    return ModelConfig(
        family="llama", pattern="*-*-", vocab_size=97, hidden_size=32, intermediate_size=48, mlp_hidden_act="silu",
        mlp_gated=True, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope=RopeConfig(),
    )  # fmt: skip


@pytest.fixture(params=[hybrid, dense], ids=["hybrid", "dense"])
def model(request):
    torch.manual_seed(0)
    decoder = Decoder(request.param())
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4  # logits with some preference, so that errors in the state show
    return decoder.eval()


def prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 24, (count,), generator=generator).tolist()
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def forced(model, prompt, tokens, temperature):
    """Log-probabilities of `tokens` from one plain forward without a state."""
    ids = torch.tensor([prompt + tokens])
    logits = model.lm_head(model(ids))[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def test_greedy_equals_naive_full_forwards(model):
    for prompt, completion in zip(
        prompts(5), Engine(model, 3, 64).generate([Request(p, greedy(12)) for p in prompts(5)]), strict=True
    ):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model.lm_head(model(torch.tensor([ids]))[0, -1]).argmax()))
        assert completion.token_ids == ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_a_teacher_forced_forward(model, temperature):
    requests = [
        Request(p, SamplingParams(max_new_tokens=30, temperature=temperature, seed=i))
        for i, p in enumerate(prompts(12))
    ]
    for request, completion in zip(requests, Engine(model, 5, 64).generate(requests), strict=True):
        exact = forced(model, request.prompt_ids, completion.token_ids, temperature)
        assert torch.allclose(torch.tensor(completion.logprobs), exact, atol=1e-4)


def mixed_requests():
    """Every kind of setting, equal prompts among them."""
    kinds = [
        {},
        {"temperature": 0.7},
        {"temperature": 0},
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.1, "logprobs": False},
    ]
    texts = prompts(9)
    return [
        Request(
            texts[i % 9],
            SamplingParams(max_new_tokens=5 + (i * 5) % 23, seed=i, stop_token_ids=(i % 7,), **kinds[i % 6]),
        )
        for i in range(27)
    ]


def test_the_same_request_gives_the_same_text_whatever_the_batch(model):
    requests = mixed_requests()
    engine = Engine(model, 8, 64)
    reference: list[Completion] = engine.generate(requests)
    alone = [engine.generate([request])[0] for request in requests]
    backwards = Engine(model, 5, 50, prefill_tokens=40).generate(requests[::-1])[::-1]
    wide = Engine(model, 64, 50).generate(requests)
    for other in (alone, backwards, wide):
        assert [c.token_ids for c in other] == [c.token_ids for c in reference]
        assert [c.finish_reason for c in other] == [c.finish_reason for c in reference]
        for a, b in zip(other, reference, strict=True):
            assert (a.logprobs is None) == (b.logprobs is None)
            assert a.logprobs is None or a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert {c.finish_reason for c in reference} == {"stop", "length"}


def test_the_seed_chooses_the_text(model):
    requests = [Request([1, 2, 3], SamplingParams(max_new_tokens=20, seed=seed)) for seed in (0, 0, 1)]
    first, again, other = Engine(model, 3, 32).generate(requests)
    assert first.token_ids == again.token_ids != other.token_ids


def test_training_goes_on_after_generation(model):
    """Nothing that generation caches (rotary tables, scan matrices) may break a later backward."""
    model.train()
    Engine(model, 3, 40).generate([Request([1, 2, 3], SamplingParams(max_new_tokens=20))])
    model.lm_head(model(torch.randint(0, 97, (2, 30)))).logsumexp(-1).sum().backward()
    assert model.training
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_recurrent_state_stays_in_float32():
    """A 16-bit model keeps its Mamba memory in float32: a 16-bit recurrence drifts."""
    engine = Engine(Decoder(hybrid()).to(torch.bfloat16), 2, 40)
    engine.add(Request([1, 2], greedy(4)))
    engine.step()
    state = engine._batch._state
    assert isinstance(state, DecodeState)
    assert state.layers[0].ssm.dtype == torch.float32
    assert state.layers[0].conv.dtype == torch.bfloat16
