"""Log-probabilities of prompts and alternatives, against a plain forward without a state."""

import math

import pytest
import torch
from tiny_models import CONFIGS, VOCAB, tiny, tokens

from bloomery.generate import Engine, Request, SamplingParams, scores


@pytest.fixture(params=["hybrid", "rope"])
def model(request):
    torch.set_num_threads(1)
    assert request.param in CONFIGS
    return tiny(request.param)


@torch.no_grad()
def forced(model, ids, temperature=1.0):
    """(tokens, vocab) log-probabilities of each next token."""
    return torch.log_softmax(model.lm_head(model(torch.tensor([ids])))[0] / temperature, -1)


def test_prompts_are_scored_and_nothing_generated(model):
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=True)
    prompts = [tokens(length, seed=length) for length in (1, 7, 40, 40, 2)]
    for prompt, found in zip(
        prompts, Engine(model, 3, 64).generate([Request(p, params) for p in prompts]), strict=True
    ):
        exact = forced(model, prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert found.prompt_logprobs[0] is None
        assert found.prompt_logprobs[1:] == pytest.approx(exact.tolist(), abs=1e-4)
        assert (found.token_ids, found.finish_reason, found.prompt_top_logprobs) == ([], "length", None)


def test_scored_prompts_are_read_whole_even_when_remembered(model):
    engine, prompt = Engine(model, 3, 200), tokens(150)
    plain = Request(prompt, SamplingParams(max_new_tokens=3))
    engine.generate([plain])
    scored = SamplingParams(max_new_tokens=3, prompt_logprobs=True)
    found, other = engine.generate([Request(prompt, scored), plain])
    assert (found.cached_tokens, other.prompt_logprobs) == (0, None)
    assert None not in found.prompt_logprobs[1:]
    assert found.token_ids == other.token_ids


def test_the_vocabulary_of_a_long_prompt_is_never_held_whole(model, monkeypatch):
    monkeypatch.setattr(scores, "_LOGITS", 10 * VOCAB)
    widths, head = [], model.lm_head
    head.register_forward_hook(lambda module, args, output: widths.append(output.numel() // VOCAB))
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=True)
    prompt = tokens(95)
    (found,) = Engine(model, 1, 100).generate([Request(prompt, params)])
    assert max(widths) == 10
    exact = forced(model, prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert found.prompt_logprobs[1:] == pytest.approx(exact.tolist(), abs=1e-4)


def test_alternatives_of_prompt_tokens(model):
    prompt = tokens(20)
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=0, prompt_logprobs=True, top_logprobs=count))
        for count in (2, 5, 0)
    ]
    two, five, none = Engine(model, 3, 64).generate(requests)
    exact = forced(model, prompt)[:-1].topk(5)
    assert five.prompt_top_logprobs[0] is None
    for place, (values, ids) in enumerate(zip(exact.values.tolist(), exact.indices.tolist(), strict=True), 1):
        assert list(five.prompt_top_logprobs[place]) == ids
        assert list(five.prompt_top_logprobs[place].values()) == pytest.approx(values, abs=1e-4)
        assert list(two.prompt_top_logprobs[place]) == ids[:2]
    assert none.prompt_top_logprobs is None


@pytest.mark.parametrize("temperature", [0, 1.0, 0.6])
def test_alternatives_of_drawn_tokens(model, temperature):
    prompt = tokens(9)
    settings = [{"top_logprobs": 3}, {}, {"top_logprobs": 1}, {"top_logprobs": 500}]
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=6 + i, temperature=temperature, seed=i, **each))
        for i, each in enumerate(settings)
    ]
    for request, found in zip(requests, Engine(model, 4, 64).generate(requests), strict=True):
        count = request.params.top_logprobs
        if not count:
            assert found.top_logprobs is None
            continue
        exact = forced(model, prompt + found.token_ids, temperature or 1.0)[len(prompt) - 1 : -1].topk(
            min(count, VOCAB)
        )
        assert len(found.top_logprobs) == len(found.token_ids)
        for top, values, ids in zip(found.top_logprobs, exact.values.tolist(), exact.indices.tolist(), strict=True):
            assert list(top)[:3] == ids[:3]
            assert list(top.values()) == pytest.approx(values, abs=1e-3)


def test_alternatives_that_a_filter_drops_are_left_out(model):
    params = SamplingParams(max_new_tokens=5, top_k=2, top_logprobs=4)
    (found,) = Engine(model, 1, 64).generate([Request(tokens(9), params)])
    for top, token, logprob in zip(found.top_logprobs, found.token_ids, found.logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == pytest.approx(logprob, abs=1e-5)
        assert sum(map(math.exp, top.values())) == pytest.approx(1, abs=1e-5)


def test_alternatives_do_not_change_the_text(model):
    plain, more = (SamplingParams(max_new_tokens=20, seed=3, top_logprobs=count) for count in (0, 4))
    one, other = Engine(model, 2, 64).generate([Request(tokens(9), each) for each in (plain, more)])
    assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
