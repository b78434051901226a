"""The static form of a decoding step, and its capture by a stand-in that records operations on the CPU as a CUDA graph
records kernels: with their addresses, computing nothing, and refusing any look at a value."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_model_decoder import MODELS, SEQ, close, make, tokens
from test_model_step import LoudCore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bloomery.generate import Engine, Request, SamplingParams
from bloomery.generate import engine as engine_module
from bloomery.model import captured, native
from bloomery.model.captured import CapturedStep, widened
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.model.state import DecodeState
from bloomery.model.step import Step

FLAT = [name for name in MODELS if "E" not in MODELS[name]["pattern"]]
LOOKS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select")


class Graph:
    """Operations in order, with the tensors they were called on."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    """Fills a graph; `undo` takes back what was written meanwhile."""

    def __init__(self, graph):
        super().__init__()
        self.graph, self._before = graph, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(function).startswith(LOOKS):
            raise RuntimeError("operation not permitted when stream is capturing")
        if function._schema.is_mutable:
            self._before.append((args[0], args[0].clone()))
        out = function(*args, **kwargs)
        self.graph.calls.append((function, args, kwargs, out))
        return out

    def undo(self):
        for tensor, before in reversed(self._before):
            tensor.copy_(before)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs captured, with everything of torch.cuda that is called replaced."""
    made = []

    @contextmanager
    def capture(graph, *_, **__):
        made.append(graph)
        with Recorder(graph) as recorder:
            yield
        recorder.undo()

    stream = SimpleNamespace(wait_stream=lambda _: None)
    fakes = {
        "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: None, "Stream": lambda _: stream,
        "stream": lambda _: nullcontext(), "current_stream": lambda: stream,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(captured.torch.cuda, name, fake)
    monkeypatch.setattr(native, "library", lambda: None)
    captured._say_once.cache_clear()
    return made


def read(decoder, ids, lengths, rows=None):
    """A state of `rows` rows (default: as many as there are prompts), of which the first hold these prompts."""
    whole = DecodeState.allocate(decoder.config, rows or len(ids), SEQ + 3)
    decoder(ids[:, : max(lengths)], state=whole.head(len(ids)), lengths=torch.tensor(lengths))
    return whole


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("lengths", [[9, 9, 9], [5, 20, 13]], ids=["aligned", "ragged"])
@pytest.mark.parametrize("name", FLAT)
@torch.no_grad()
def test_the_static_form_gives_the_same_logits(name, lengths, kernels, graphs, monkeypatch):
    if kernels:
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    decoder, ids = make(name), tokens(3)
    whole, expected = read(decoder, ids, lengths, rows=5), read(decoder, ids, lengths)
    whole.lengths[3:] = torch.tensor([SEQ + 3, 0])  # what a full row left behind, and a free one
    step, plain, moves = CapturedStep(decoder), Step(decoder), torch.tensor([1, 1, 1, 0, 0])
    held = torch.tensor(lengths)
    for _ in range(5):
        following = ids.gather(1, held[:, None])
        found = step.static(torch.cat([following, following[:2]]), whole, moves)
        close(found[:3], plain(following, expected))
        held = held + 1
    assert whole.lengths.tolist() == [*held.tolist(), SEQ + 3, 0]


@pytest.mark.parametrize("name", FLAT)
@torch.no_grad()
def test_a_captured_step_equals_an_ordinary_one(name, graphs):
    decoder, ids, held = make(name), tokens(3), torch.tensor([5, 20, 13])
    whole, expected = read(decoder, ids, held.tolist(), rows=6), read(decoder, ids, held.tolist())
    step, plain = CapturedStep(decoder), Step(decoder)
    for _ in range(5):
        following = ids.gather(1, held[:, None])
        with torch.inference_mode():
            found = step(following, whole.head(3))
        close(found, plain(following, expected))
        held = held + 1
    assert len(graphs) == 1
    assert whole.lengths.tolist() == [*held.tolist(), 0, 0, 0]
    for row in range(3):
        for ours, true in zip(whole.memory(row), expected.memory(row), strict=True):
            close(ours, true)


@torch.no_grad()
def test_a_graph_for_each_number_of_rows_and_place_of_the_memory(graphs):
    decoder, ids = make("windowed"), tokens(4)
    state = read(decoder, ids, [3, 4, 5, 6], rows=9)
    step = CapturedStep(decoder)
    for rows in (3, 4, 3, 4, 2, 2):
        step(ids[:rows, :1], state.head(rows))
    assert len(graphs) == 2  # of 4 and of 2 rows
    state.resize(9, 2 * SEQ)
    for _ in range(3):
        step(ids[:, :1], state.head(4))
    assert len(graphs) == 3


@pytest.mark.parametrize(("rows", "there", "found"), [(1, 99, 1), (3, 99, 4), (5, 99, 8), (9, 99, 16), (9, 12, 12)])
def test_rows_are_rounded_up_to_what_has_a_graph(rows, there, found):
    state = DecodeState.allocate(make("windowed").config, there, 1)
    assert widened(state.head(rows)).batch == found
    assert widened(state.only(0)).batch == 1


@torch.no_grad()
def test_a_layer_called_as_it_is_stands_against_it(graphs, capsys):
    decoder, ids = make("dense"), tokens(2)
    decoder.layers[2].mixer.core = LoudCore()
    state, expected = read(decoder, ids, [4, 4]), read(decoder, ids, [4, 4])
    step = CapturedStep(decoder)
    for _ in range(3):
        close(step(ids[:, :1], state), Step(decoder)(ids[:, :1], expected))
    assert not graphs
    assert capsys.readouterr().err.count("not captured as CUDA graphs, which is slower: layer 2 (*) is called") == 1


@torch.no_grad()
def test_a_capture_that_is_refused_leaves_no_trace(graphs, capsys, monkeypatch):
    decoder, ids = make("windowed"), tokens(2)
    state, expected = read(decoder, ids, [4, 7]), read(decoder, ids, [4, 7])
    step, plain = CapturedStep(decoder), Step(decoder)
    original = CapturedStep.static

    def looking(self, given, state, moves):
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            int(moves.sum())
        return original(self, given, state, moves)

    monkeypatch.setattr(CapturedStep, "static", looking)
    for place in range(4):
        close(step(ids[:, place : place + 1], state), plain(ids[:, place : place + 1], expected))
    assert "operation not permitted" in capsys.readouterr().err


@torch.no_grad()
def test_the_engine_writes_the_same_through_graphs(graphs, monkeypatch):
    torch.manual_seed(0)
    config = ModelConfig(
        pattern="M-*-", vocab_size=61, hidden_size=24, intermediate_size=40, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=6, rope=RopeConfig(), chunk_size=8,
    )  # fmt: skip
    decoder = Decoder(config).eval()
    requests = [
        Request(ids[: 3 + place], SamplingParams(max_new_tokens=4 + 35 * place, seed=place))
        for place, ids in enumerate(tokens(5).tolist())
    ]
    expected = Engine(decoder, 3, 200).generate(requests)
    monkeypatch.setattr(engine_module, "prepared", lambda model, deterministic: CapturedStep(model))
    found = Engine(decoder, 3, 200).generate(requests)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert graphs
