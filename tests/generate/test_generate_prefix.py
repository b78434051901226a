"""Prompts that begin alike: the same texts with and without the cache, and less read."""

import pytest
import torch
from tiny_models import CONFIGS, tiny, tokens
from torch import nn

from bloomery.generate import Completion, Engine, Request, SamplingParams
from bloomery.generate.prefix import BLOCK, PrefixCache
from bloomery.model.state import DecodeState


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny(request.param)


class Count(nn.Module):
    """A model that counts the prompt tokens it reads."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.lm_head, self.read = model, model.config, model.lm_head, 0

    def forward(self, input_ids, **settings):
        if input_ids.shape[1] > 1:
            self.read += input_ids.numel()
        return self.inner(input_ids, **settings)


def params(seed=0, limit=12, **settings):
    return SamplingParams(max_new_tokens=limit, seed=seed, temperature=0.7, **settings)


def engine(model, **settings):
    return Engine(model, max_batch=4, max_tokens=600, **settings)


def assert_same(found: list[Completion], expected: list[Completion]):
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


SHARED = tokens(3 * BLOCK + 9, seed=1)
FAMILIES = {
    "one prompt": [SHARED] * 5,
    "common beginning": [SHARED + tokens(5 + 30 * i, seed=i) for i in range(6)],
    "one continues the other": [SHARED[:200], SHARED, SHARED + tokens(4), SHARED + tokens(90)],
    "two families": [tokens(2 * BLOCK, seed=i % 2) + tokens(20, seed=9 + i) for i in range(6)],
    "whole blocks": [SHARED[: 2 * BLOCK]] * 2 + [SHARED[: 3 * BLOCK], SHARED[: 2 * BLOCK] + tokens(3)],
    "short": [tokens(3), tokens(3), [*tokens(3), 5], tokens(3)],
}


@pytest.mark.parametrize("prompts", FAMILIES.values(), ids=FAMILIES)
def test_the_cache_changes_nothing_but_what_is_read(model, prompts):
    requests = [Request(prompt, params(seed)) for seed, prompt in enumerate(prompts)]
    expected = engine(model, prefix_cache_bytes=0).generate(requests)
    cached = engine(model)
    assert_same(cached.generate(requests), expected)  # together
    assert_same(cached.generate(requests[::-1])[::-1], expected)  # again, mostly remembered
    alone = engine(model)
    assert_same([alone.generate([request])[0] for request in requests], expected)  # one after the other
    assert {c.cached_tokens for c in expected} == {0}


def test_a_common_beginning_of_prompts_that_come_together_is_read_once(model):
    counting = Count(model)
    prompts = [SHARED + tokens(20, seed=i) for i in range(4)]
    found = engine(counting).generate([Request(prompt, params()) for prompt in prompts])
    assert [c.cached_tokens for c in found] == [0, *[3 * BLOCK] * 3]
    assert counting.read <= len(prompts[0]) + 3 * (9 + 20)


def test_a_later_prompt_with_the_same_beginning():
    """Attention remembers every block at once; recurrent memory is kept where prompts were seen to part."""
    prompts = [SHARED + tokens(20, seed=i) for i in range(3)]
    for kind, expected in (("rope", [0, 3 * BLOCK, 3 * BLOCK]), ("hybrid", [0, 0, 3 * BLOCK])):
        one = engine(tiny(kind))
        assert [one.generate([Request(prompt, params())])[0].cached_tokens for prompt in prompts] == expected


def test_a_conversation_goes_on_from_the_end_of_the_last_answer(model):
    counting = Count(model)
    one, prompt, read = engine(counting), SHARED, []
    for turn in range(3):
        before = counting.read
        (completion,) = one.generate([Request(prompt, params(turn))])
        (expected,) = engine(model, prefix_cache_bytes=0).generate([Request(prompt, params(turn))])
        assert_same([completion], [expected])
        read.append(counting.read - before)
        assert read[-1] == len(prompt) - completion.cached_tokens
        last = [*prompt, *completion.token_ids]
        prompt = [*last, *tokens(10, seed=turn)]
    assert read[0] == len(SHARED)
    assert read[1] <= 12 + 10  # the first answer and the turn
    assert read[2] == 1 + 10  # only the turn, and the last token of the answer before it, which was never fed
    assert last


def test_equal_prompts_are_read_once_even_when_some_wait_or_come_later(model):
    counting = Count(model)
    one = engine(counting)
    requests = [Request(SHARED, params(seed)) for seed in range(9)]
    found = one.generate(requests)
    assert counting.read == len(SHARED)
    one.generate(requests[:1])
    assert counting.read == len(SHARED)
    assert [c.cached_tokens for c in found].count(0) == 4  # the rows of the first reading


def test_without_a_cache_equal_prompts_that_begin_together_are_read_once(model):
    counting = Count(model)
    engine(counting, prefix_cache_bytes=0).generate([Request(SHARED, params(seed)) for seed in range(4)])
    assert counting.read == len(SHARED)


def test_sync_drops_what_was_computed_with_old_weights(model):
    counting = Count(model)
    one, request = engine(counting), Request(SHARED, params())
    one.generate([request])
    one.sync()
    assert one.stats.prefix_bytes == 0
    assert one.generate([request])[0].cached_tokens == 0
    assert counting.read == 2 * len(SHARED)


def test_weights_changed_without_sync_are_noticed(model):
    one, request = engine(model), Request(SHARED, params())
    before = one.generate([request])[0]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(0.5)
    after = one.generate([request])[0]
    assert after.cached_tokens == 0
    assert after.logprobs != before.logprobs
    assert_same([after], engine(model).generate([request]))


def test_a_cancelled_request_leaves_the_cache_usable(model):
    one = engine(model, prefill_tokens=BLOCK)
    ticket = one.add(Request(SHARED + tokens(40), params()))
    for _ in range(2):
        one.step()
    one.cancel(ticket)
    requests = [Request(SHARED + tokens(30, seed=i), params(i)) for i in range(3)]
    assert_same(one.generate(requests), engine(model, prefix_cache_bytes=0).generate(requests))


def test_no_more_is_kept_than_allowed(model):
    state = DecodeState.allocate(model.config, 1, 2 * BLOCK)
    limit = int(3.5 * state.nbytes)
    one = engine(model, prefix_cache_bytes=limit)
    requests = [Request(tokens(2 * BLOCK - 3, seed=i), params(i)) for i in range(9)]
    found = one.generate(requests)
    assert_same(found, engine(model, prefix_cache_bytes=0).generate(requests))
    assert 0 < one.stats.prefix_bytes <= limit
    assert one.generate(requests[-1:])[0].cached_tokens > 0
    assert one.generate(requests[:1])[0].cached_tokens == 0


def filled(config, length):
    state = DecodeState.allocate(config, 1, length)
    for layer in state.layers:
        for buffer in vars(layer).values() if layer else ():
            buffer.normal_()
    state.lengths += length
    return state


def test_what_prompts_share_is_stored_once():
    config = CONFIGS["rope"]
    cache = PrefixCache(2**30, recurrent=False, fixed=False, weights=int)
    text = tuple(tokens(2 * BLOCK + 10))
    for end in (10, 20):
        cache.insert((*text[: 2 * BLOCK], *tokens(end, seed=end)), filled(config, 2 * BLOCK + end), 0)
    assert cache.nbytes == config.cache_bytes(1, 2 * BLOCK + 10 + 20, torch.float32)


def test_what_was_used_longest_ago_goes_first():
    config = CONFIGS["mamba"]
    size = config.cache_bytes(1, 0, torch.float32)
    cache = PrefixCache(2 * size, recurrent=True, fixed=False, weights=int)
    first, second, third = (tuple(tokens(10, seed=seed)) for seed in range(3))
    for text in (first, second):
        cache.insert(text, filled(config, 10), 0)
    assert cache.find((*first, 1)).held == 10
    cache.insert(third, filled(config, 10), 0)
    assert [cache.find((*text, 1)).held for text in (first, second, third)] == [10, 0, 10]
    assert cache.nbytes == 2 * size


def test_what_is_restored_is_what_was_kept():
    config = CONFIGS["hybrid"]
    cache = PrefixCache(2**30, recurrent=True, fixed=False, weights=int)
    text, source = tuple(tokens(BLOCK + 7)), filled(config, BLOCK + 7)
    cache.insert(text, source, 0)
    target = DecodeState.allocate(config, 2, 3 * BLOCK)
    cache.find((*text, 1)).restore(target, 1)
    assert target.lengths.tolist() == [0, len(text)]
    for mine, theirs in zip(
        target.span(1, 0, len(text)) + target.memory(1), source.span(0, 0, len(text)) + source.memory(0), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_what_does_not_fit_is_not_kept():
    config = CONFIGS["mamba"]
    cache = PrefixCache(100, recurrent=True, fixed=False, weights=int)
    cache.insert(tuple(tokens(10)), filled(config, 10), 0)
    assert (len(cache), cache.nbytes) == (0, 0)
