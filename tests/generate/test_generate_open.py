"""The engine as a server uses it: add, step, cancel; its memory; its pieces; the weights it is handed."""

from itertools import chain

import pytest
import torch
from tiny_models import CONFIGS, VOCAB, tiny, tokens
from torch import nn

from bloomery.errors import ConfigError
from bloomery.generate import Engine, Request, SamplingParams


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny(request.param)


class Watch(nn.Module):
    """A model that notes the shape of every call of `forward`: the reading of prompts, and steps of one token."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.lm_head, self.calls = model, model.config, model.lm_head, []

    def forward(self, input_ids, **settings):
        self.calls.append(tuple(input_ids.shape))
        return self.inner(input_ids, **settings)


def params(seed=0, limit=8, **settings):
    return SamplingParams(max_new_tokens=limit, seed=seed, **settings)


def run(engine):
    """All updates until nothing is left to do, in order."""
    updates = []
    while engine.busy:
        updates += engine.step()
    return updates


def test_updates_of_a_stream_add_up_to_its_completion(model):
    requests = [
        Request(tokens(3 + 9 * i, seed=i), params(i, limit=4 + i, top_logprobs=i % 3), stream=i != 2) for i in range(6)
    ]
    engine = Engine(model, max_batch=3, max_tokens=80)
    tickets = [engine.add(request) for request in requests]
    updates = run(engine)
    expected = Engine(model, max_batch=6, max_tokens=80).generate(requests)
    for ticket, request, whole in zip(tickets, requests, expected, strict=True):
        mine = [update for update in updates if update.ticket == ticket]
        assert [update.completion is None for update in mine] == [True] * (len(mine) - 1) + [False]
        assert mine[-1].completion.token_ids == whole.token_ids
        if request.stream:
            assert [len(update.token_ids) for update in mine] == [1] * len(whole.token_ids)
            assert list(chain.from_iterable(update.token_ids for update in mine)) == whole.token_ids
            assert list(chain.from_iterable(update.logprobs for update in mine)) == pytest.approx(
                whole.logprobs, abs=1e-4
            )
            assert (mine[0].top_logprobs is None) == (request.params.top_logprobs == 0)
            if request.params.top_logprobs:
                tops = chain.from_iterable(update.top_logprobs for update in mine)
                assert [list(top) for top in tops] == [list(top) for top in whole.top_logprobs]
        else:
            assert [(update.token_ids, update.logprobs) for update in mine] == [([], [])]


def test_a_step_of_an_idle_engine_is_nothing():
    engine = Engine(tiny("hybrid"), 2, 20)
    assert (engine.step(), engine.busy, engine.running, engine.waiting) == ([], False, 0, 0)


def test_requests_may_come_at_any_time():
    model, found = tiny("hybrid"), {}
    engine = Engine(model, max_batch=2, max_tokens=60)
    requests = [Request(tokens(5 + i, seed=i), params(i, limit=3 + i % 4)) for i in range(8)]
    for request in requests:
        engine.add(request)
        for update in engine.step():
            found[update.ticket] = update.completion
    found |= {update.ticket: update.completion for update in run(engine)}
    expected = Engine(model, max_batch=8, max_tokens=60).generate(requests)
    assert [found[ticket].token_ids for ticket in range(8)] == [c.token_ids for c in expected]


@pytest.mark.parametrize("steps", [0, 1, 2, 5], ids=["waiting", "being read", "begun", "running"])
def test_cancelled_requests_free_their_place_and_disturb_nobody(model, steps):
    engine = Engine(model, max_batch=2, max_tokens=200, prefill_tokens=16)
    requests = [Request(tokens(40, seed=i), params(i, limit=12)) for i in range(4)]
    tickets = [engine.add(request) for request in requests]
    updates = []
    for _ in range(steps):
        updates += engine.step()
    engine.cancel(tickets[0])
    engine.cancel(tickets[0])
    engine.cancel(99)
    finished = {update.ticket: update.completion for update in updates + run(engine)}
    expected = Engine(model, max_batch=4, max_tokens=200).generate(requests)
    assert {ticket: c.token_ids for ticket, c in finished.items()} == {
        ticket: expected[i].token_ids for i, ticket in enumerate(tickets) if i
    }
    assert (engine.running, engine.waiting) == (0, 0)


def test_the_last_request_cancelled_leaves_an_idle_engine():
    model = tiny("hybrid").train()
    engine = Engine(model, 2, 60)
    ticket = engine.add(Request(tokens(5), params()))
    engine.step()
    assert not model.training
    assert engine.stats.cache_bytes > 0
    engine.cancel(ticket)
    assert (engine.busy, engine.step(), engine.stats.cache_bytes) == (False, [], 0)
    assert model.training


def test_a_request_that_cannot_run_is_refused_at_once():
    engine = Engine(tiny("hybrid"), 2, 20)
    with pytest.raises(ConfigError, match="request: a prompt of 15 tokens and max_new_tokens 8 do not fit"):
        engine.add(Request(tokens(15), params()))
    assert not engine.busy


def test_open_use_and_a_stream_share_the_rows_and_get_their_own_news():
    model = tiny("rope")
    engine = Engine(model, max_batch=2, max_tokens=60)
    requests = [Request(tokens(4, seed=i), params(i, limit=3 + 2 * i)) for i in range(4)]
    tickets = [engine.add(request) for request in requests[:2]]
    found = dict(engine.stream(requests[2:]))
    finished = {update.ticket: update.completion for update in engine.step() + run(engine)}
    expected = [c.token_ids for c in Engine(model, 4, 60).generate(requests)]
    assert [finished[ticket].token_ids for ticket in tickets] == expected[:2]
    assert [found[index].token_ids for index in range(2)] == expected[2:]


def test_sync_in_open_use():
    engine = Engine(tiny("hybrid"), max_batch=1, max_tokens=60)
    running, waiting = (engine.add(Request(tokens(4, seed=i), params(i))) for i in range(2))
    for _ in range(3):
        engine.step()
    engine.sync()
    updates = run(engine)
    assert [(u.ticket, u.completion.finish_reason, u.completion.weight_version) for u in updates] == [
        (running, "abort", 0), (waiting, "length", 1),
    ]  # fmt: skip
    assert 0 < len(updates[0].completion.token_ids) < 8


def test_a_prompt_in_the_middle_of_being_read_is_read_again_after_sync():
    model = Watch(tiny("rope"))
    engine = Engine(model, max_batch=1, max_tokens=60, prefill_tokens=16)
    engine.add(Request(tokens(40), params()))
    engine.step()
    engine.sync()
    (update,) = run(engine)
    assert (update.completion.weight_version, update.completion.finish_reason) == (1, "length")
    assert [seq for _, seq in model.calls if seq > 1] == [16, 16, 16, 8]


def test_a_long_prompt_is_read_in_pieces_while_others_go_on():
    model = Watch(tiny("hybrid"))
    engine = Engine(model, max_batch=2, max_tokens=300, prefill_tokens=32)
    engine.add(Request(tokens(4), params(limit=40)))
    engine.step()
    engine.add(Request(tokens(200), params(limit=2)))
    del model.calls[:]
    run(engine)
    pieces = [shape for shape in model.calls if shape[1] > 1]
    assert [seq for _, seq in pieces] == [32] * 6 + [8]
    assert model.calls[: 2 * len(pieces)] == [shape for piece in pieces for shape in ((1, 1), piece)]


@pytest.mark.parametrize("budget", [7, 64, 100])
def test_pieces_equal_one_reading(model, budget):
    requests = [
        Request(tokens(length, seed=length), params(length, limit=6, prompt_logprobs=length % 2 == 0))
        for length in (150, 3, 99, 64, 65, 128)
    ]
    pieces = Engine(model, 4, 200, prefill_tokens=budget, prefix_cache_bytes=0).generate(requests)
    whole = Engine(model, 4, 200, prefix_cache_bytes=0).generate(requests)
    for one, other in zip(pieces, whole, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert (one.prompt_logprobs or [None])[1:] == pytest.approx((other.prompt_logprobs or [None])[1:], abs=1e-4)


def test_short_requests_take_little_memory_however_large_the_engine(model):
    most, config = [], model.config
    engine = Engine(model, max_batch=1000, max_tokens=4096)
    for seed in range(3):
        engine.add(Request(tokens(5), params(seed, limit=1000, stop_token_ids=tuple(range(0, VOCAB, 9)))))
    while engine.busy:
        engine.step()
        most.append(engine.stats.cache_bytes)
    assert max(most) <= config.cache_bytes(3, 256, torch.float32)
    assert engine.stats.cache_bytes == 0


def test_memory_grows_with_the_sequences_and_its_bytes_are_those_predicted(model):
    engine, seen = Engine(model, max_batch=5, max_tokens=400), []
    requests = [Request(tokens(5, seed=i), params(i, limit=390 - i)) for i in range(3)]
    tickets = [engine.add(request) for request in requests]
    found = {}
    while engine.busy:
        found |= {update.ticket: update.completion for update in engine.step()}
        seen.append(engine.stats.cache_bytes)
    sizes = [model.config.cache_bytes(3, tokens, torch.float32) for tokens in (128, 256, 416)]
    assert sorted(set(seen) - {0}) == sorted(set(sizes))
    expected = Engine(model, max_batch=1, max_tokens=400).generate(requests)
    assert [found[ticket].token_ids for ticket in tickets] == [c.token_ids for c in expected]


def test_memory_that_long_sequences_leave_behind_is_given_back(monkeypatch):
    monkeypatch.setattr("bloomery.generate.batch._WORTH_FREEING", 0)
    model = tiny("hybrid")
    engine = Engine(model, max_batch=4, max_tokens=2000)
    requests = [Request(tokens(1500), params(limit=6))] + [Request(tokens(5, seed=i), params(i, 30)) for i in range(3)]
    tickets = [engine.add(request) for request in requests]
    found, seen = {}, []
    while engine.busy:
        found |= {update.ticket: update.completion for update in engine.step()}
        seen.append(engine.stats.cache_bytes)
    assert max(seen) >= model.config.cache_bytes(4, 1506, torch.float32)
    assert seen[-2] <= model.config.cache_bytes(3, 128, torch.float32)
    expected = Engine(model, max_batch=1, max_tokens=2000).generate(requests)
    assert [found[ticket].token_ids for ticket in tickets] == [c.token_ids for c in expected]


def test_stats_count_what_was_done():
    engine = Engine(tiny("rope"), max_batch=4, max_tokens=400)
    engine.generate([Request(tokens(100), params(seed)) for seed in range(6)])
    stats = engine.stats
    assert (stats.requests, stats.prompt_tokens, stats.cached_prompt_tokens) == (6, 600, 200)
    assert (stats.generated_tokens, stats.running, stats.waiting, stats.cache_bytes) == (48, 0, 0, 0)
    assert stats.prefix_bytes == engine.model.config.cache_bytes(1, 100, torch.float32) + VOCAB * 4


def test_positions_the_model_was_not_meant_for_are_refused():
    config = CONFIGS["rope"].max_position_embeddings
    with pytest.raises(ConfigError, match=f"max_tokens: {config + 1}, but .* {config} tokens; lower max_tokens"):
        Engine(tiny("rope"), 1, config + 1)
    Engine(tiny("attention"), 1, config + 1)  # no positions, no limit


def test_weights_are_handed_over_in_place():
    trained, serving = tiny("hybrid"), tiny("hybrid")
    for parameter in trained.parameters():
        parameter.data.mul_(1.2)
    engine, request = Engine(serving, 2, 60), Request(tokens(9), params())
    places = [parameter.data_ptr() for parameter in serving.parameters()]
    engine.generate([request])
    engine.sync(trained.state_dict())
    assert places == [parameter.data_ptr() for parameter in serving.parameters()]
    (found,) = engine.generate([request])
    (expected,) = Engine(trained, 2, 60).generate([request])
    assert (found.token_ids, found.logprobs, found.weight_version) == (expected.token_ids, expected.logprobs, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.weight"), "sync: 1 of the weights is missing, the first is norm.weight"),
        (lambda w: w.update(extra=torch.ones(1)), "sync: 1 of the weights is unknown, the first is extra"),
        (lambda w: w.update({"norm.weight": torch.ones(3)}), r"norm.weight is \(3,\) .*, expected \(32,\)"),
        (lambda w: w.update({"norm.weight": w["norm.weight"].half()}), "torch.float16, expected .*torch.float32; hand"),
    ],
)
def test_weights_of_another_model_are_refused_before_any_is_copied(change, message):
    model = tiny("hybrid")
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    change(weights)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=message):
        Engine(model, 1, 20).sync(weights)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
