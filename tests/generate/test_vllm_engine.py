"""vLLM's side played by a few lines with the same names; the real one needs a GPU."""

import builtins
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bloomery.errors import ConfigError
from bloomery.generate.request import Request
from bloomery.generate.sampling import SamplingParams
from bloomery.generate.vllm import VllmEngine


@dataclass
class Logprob:
    logprob: float
    rank: int = 1


class CountingEngine:
    """Continues a prompt that ends in n with n + 1, n + 2 …; the shortest text ends first. Each token has logprob −0.5,
    beside an alternative at −0.1."""

    def __init__(self):
        self.open, self.aborted = {}, []

    def add_request(self, request_id, prompt, params):
        assert isinstance(request_id, str)
        self.open[request_id] = (prompt["prompt_token_ids"], params)

    def step(self):
        name = min(self.open, key=lambda one: self.open[one][1].max_tokens)
        prompt, params = self.open.pop(name)
        ids = [prompt[-1] + 1 + place for place in range(params.max_tokens)]
        at = [{token: Logprob(-0.5), 99: Logprob(-0.1)} for token in ids]
        written = SimpleNamespace(
            token_ids=tuple(ids), text=" ".join(map(str, ids)), finish_reason="length",
            logprobs=at if params.logprobs is not None else None,
        )  # fmt: skip
        behind = [None, *({token: Logprob(-0.25), 99: Logprob(-0.1)} for token in prompt[1:])]
        return [SimpleNamespace(
            request_id=name, finished=True, outputs=[written], num_cached_tokens=len(prompt) - 1,
            prompt_logprobs=behind if params.prompt_logprobs is not None else None,
        )]  # fmt: skip

    def abort_request(self, names):
        self.aborted += names


class Llm:
    def __init__(self, **settings):
        self.settings, self.llm_engine, self.calls = settings, CountingEngine(), []
        self.model = torch.nn.Linear(2, 2, bias=False)
        self.model.load_weights = lambda pairs: self.model.load_state_dict(dict(pairs))

    def apply_model(self, function):
        return [function(self.model)]

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, kwargs))

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def wake_up(self):
        self.calls.append("wake_up")


@dataclass
class Params:
    """The fields of vLLM's SamplingParams that we use; any other name is an error, as there."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: list
    stop_token_ids: list
    ignore_eos: bool
    seed: int
    logprobs: int | None
    prompt_logprobs: int | None
    output_kind: str
    extra: dict = field(default_factory=dict, init=False)


@pytest.fixture
def engine(monkeypatch):
    vllm, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    sampling.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")
    vllm.LLM, vllm.SamplingParams, vllm.TokensPrompt, vllm.sampling_params = Llm, Params, dict, sampling
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    return VllmEngine(Path("folder"), max_batch=4, max_tokens=32, enforce_eager=True)


def wanted(*prompt, **settings):
    return Request(prompt, SamplingParams(**{"max_new_tokens": 2} | settings))


def test_settings_reach_vllm(engine):
    assert engine._llm.settings == {
        "model": "folder", "max_num_seqs": 4, "max_model_len": 32, "logprobs_mode": "processed_logprobs",
        "enforce_eager": True,
    }  # fmt: skip


def test_completions_come_in_order(engine):
    completions = engine.generate([wanted(1, max_new_tokens=3), wanted(5, 6)])
    assert [completion.token_ids for completion in completions] == [[2, 3, 4], [7, 8]]
    assert completions[0].logprobs == [-0.5] * 3
    assert (completions[1].text, completions[1].cached_tokens, completions[1].finish_reason) == ("7 8", 1, "length")
    assert completions[0].top_logprobs is completions[0].prompt_logprobs is None


def test_stream_yields_each_as_it_finishes_and_aborts_the_rest(engine):
    stream = engine.stream([wanted(1, max_new_tokens=9), wanted(1, max_new_tokens=1), wanted(1, max_new_tokens=5)])
    assert next(stream)[0] == 1
    stream.close()
    assert engine._llm.llm_engine.aborted == ["0", "2"]


def test_alternatives_and_prompt_logprobs(engine):
    [found] = engine.generate([wanted(3, 4, max_new_tokens=1, top_logprobs=1, prompt_logprobs=True)])
    assert (found.logprobs, found.top_logprobs) == ([-0.5], [{99: -0.1}])
    assert (found.prompt_logprobs, found.prompt_top_logprobs) == ([None, -0.25], [None, {99: -0.1}])


def test_scoring_alone_drops_the_token_that_vllm_must_write(engine):
    [found] = engine.generate([wanted(3, 4, max_new_tokens=0, prompt_logprobs=True)])
    assert (found.token_ids, found.logprobs, found.prompt_logprobs, found.text) == ([], [], [None, -0.25], "")


def test_new_weights_are_loaded_in_this_process(engine):
    weight = torch.full((2, 2), 7.0)
    engine.sync({"weight": weight})
    assert torch.equal(engine._llm.model.weight, weight)
    assert engine._llm.calls == ["reset_prefix_cache"]
    assert engine.generate([wanted(1)])[0].weight_version == engine.weight_version == 1


def test_new_weights_from_a_folder_are_read_by_the_workers(engine):
    engine.sync(Path("next"))
    assert engine._llm.calls[0] == ("reload_weights", {"weights_path": "next"})
    assert engine.weight_version == 1


def test_sleep_and_wake(engine):
    engine.sleep()
    engine.wake_up()
    assert engine._llm.calls == [("sleep", 1), "wake_up"]


def test_without_vllm(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name == "vllm":
            raise ImportError("No module named 'vllm'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'bloomery\[vllm\]'"):
        VllmEngine(Path("folder"), max_batch=1, max_tokens=8)
