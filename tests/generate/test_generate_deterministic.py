"""With `deterministic`, a request's tokens and logprobs are the same to the bit, whatever else runs (on a CPU)."""

import pytest
import torch
from tiny_models import CONFIGS, tiny, tokens

from bloomery.generate import Engine, Request, SamplingParams
from bloomery.generate.prefix import BLOCK

KINDS = [{}, {"temperature": 0.7}, {"temperature": 0}, {"top_k": 20}, {"top_p": 0.8, "top_logprobs": 3}]
SHARED = tokens(2 * BLOCK + 20)


@pytest.fixture(params=CONFIGS)
def model(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny(request.param)
    torch.set_num_threads(threads)


def requests():
    prompts = [
        tokens(5),
        tokens(70, seed=1),
        SHARED,
        SHARED + tokens(9, seed=2),
        SHARED[:-9] + tokens(80, seed=3),
        SHARED,
    ]
    return [
        Request(prompt, SamplingParams(max_new_tokens=6 + 3 * (i % 3), seed=i, **KINDS[i % 5]))
        for i, prompt in enumerate(prompts)
    ]


def bits(completions):
    return [(c.token_ids, c.logprobs, c.top_logprobs) for c in completions]


def test_to_the_bit(model):
    alone = [Engine(model, 1, 300, deterministic=True, prefix_cache_bytes=0).generate([r])[0] for r in requests()]
    crowd = Engine(model, 6, 300, deterministic=True)
    assert bits(crowd.generate(requests())) == bits(alone)
    remembered = crowd.generate(requests()[::-1])[::-1]
    assert bits(remembered) == bits(alone)
    assert sum(c.cached_tokens > 0 for c in remembered) >= 4
    narrow = Engine(model, 2, 280, deterministic=True, prefill_tokens=50)
    assert bits(narrow.generate(requests()[::-1])[::-1]) == bits(alone)
