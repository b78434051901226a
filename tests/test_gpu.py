"""What must also hold on a GPU: the same logits, training in bf16, generation. Skipped where there is none."""

import pytest
import torch

from bloomery.generate import Engine, Request, SamplingParams
from bloomery.generate import engine as engine_module
from bloomery.model import gpu
from bloomery.model.captured import CapturedStep, prepared
from bloomery.model.config import ModelConfig
from bloomery.model.conv import causal_conv
from bloomery.model.decoder import Decoder
from bloomery.model.scan import ChunkedScan
from bloomery.model.state import DecodeState
from bloomery.model.step import Step
from bloomery.train.fp8 import Fp8Config
from bloomery.train.fp8_linear import Fp8Product, multiplies
from bloomery.train.loop import LoopConfig, TrainState, steps
from bloomery.train.losses import next_token
from bloomery.train.optim import adamw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
HYBRID = ModelConfig(
    pattern="M-*-M-", vocab_size=256, hidden_size=128, intermediate_size=256, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=32, chunk_size=32,
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decoder(HYBRID)


@pytest.fixture
def ids():
    return torch.randint(256, (4, 97), generator=torch.Generator().manual_seed(1))


def test_logits_equal_those_of_the_cpu(model, ids):
    with torch.no_grad():
        expected = model.lm_head(model(ids))
        found = model.cuda().lm_head(model(ids.cuda())).cpu()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_the_loss_falls_in_bf16(model, ids):
    loop = LoopConfig(max_steps=30, batch_size=4, learning_rate=3e-3, precision="bf16")
    state = TrainState(model.cuda(), adamw(model, loop))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    losses = [step.loss for step in steps(state, iter([[batch]] * 30), next_token, loop)]
    assert losses[-1] < 0.7 * losses[0]


def test_greedy_text_follows_the_forward_pass(model, ids):
    model = model.cuda().eval()
    prompt = ids[0, :16].tolist()
    [completion] = Engine(model, max_batch=2, max_tokens=64).generate(
        [Request(prompt, SamplingParams(max_new_tokens=8, temperature=0.0))]
    )
    with torch.no_grad():
        for number, token in enumerate(completion.token_ids):
            context = torch.tensor([prompt + completion.token_ids[:number]], device="cuda")
            logits = model.lm_head(model(context))[0, -1]
            assert logits[token] > logits.max() - 1e-3


@pytest.mark.skipif(
    not (torch.cuda.is_available() and multiplies("e4m3", "e5m2", torch.device("cuda"))), reason="no FP8 units"
)
class TestFp8:
    """The path through `torch._scaled_mm`; its emulation is tested on the CPU."""

    @pytest.mark.parametrize("rows", [256, 77])
    def test_products_equal_their_emulation(self, rows):
        linear = torch.nn.Linear(128, 64, bias=False, device="cuda")
        x, dy = torch.randn(rows, 128, device="cuda"), 1e-5 * torch.randn(rows, 64, device="cuda")
        found = []
        for emulated in (False, True):
            layer, given, linear.weight.grad = Fp8Product(linear), x.clone().requires_grad_(), None
            assert not layer.emulated
            layer.emulated = emulated
            y = layer(given)
            y.backward(dy)
            found.append((y, given.grad, linear.weight.grad))
        for ours, exact in zip(*found, strict=True):
            assert (ours - exact).norm() < 1e-3 * exact.norm()

    def test_the_loss_falls(self, model, ids):
        fp8 = Fp8Config(high_precision_layers=1, measure_every_steps=10)
        loop = LoopConfig(max_steps=30, batch_size=4, learning_rate=3e-3, precision="fp8", fp8=fp8)
        state = TrainState(model.cuda(), adamw(model, loop))
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        done = list(steps(state, iter([[batch]] * 30), next_token, loop))
        assert done[-1].loss < 0.7 * done[0].loss
        assert done[-1].fp8["layers.1.mixer.up_proj"]["dY"]["amax"] > 0


SCANS = {"mamba_ssm_scan": gpu._SSD, "fla_scan": gpu._GLA, "compiled_scan": "torch"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", SCANS)
def test_every_form_of_the_scan_equals_the_plain_one(name, dtype, tolerance, packed):
    if gpu.installed(SCANS[name]) is None:
        pytest.skip(f"{SCANS[name]} is not installed")
    torch.manual_seed(0)
    with torch.device("cuda"):
        x, B, C = torch.randn(2, 200, 8, 64), torch.randn(2, 200, 2, 64), torch.randn(2, 200, 2, 64)
        dt, A, D = torch.rand(2, 200, 8) * 0.1, -torch.rand(8) * 15 - 1, torch.ones(8)
        initial, ids = torch.randn(2, 8, 64, 64), (torch.arange(200) // 70).expand(2, -1) if packed else None
    given = [t.to(dtype).requires_grad_() if t.dim() == 4 else t.requires_grad_() for t in (x, dt, A, B, C, D)]
    found = getattr(gpu, name)(*given, ids, initial, 64)
    expected = ChunkedScan(64)(*given, ids, initial)
    tolerance = 1e-4 if name == "compiled_scan" else tolerance
    weights = [torch.randn_like(t) for t in expected]
    gradients = [
        torch.autograd.grad(out, given, [w.to(t.dtype) for w, t in zip(weights, out, strict=True)])
        for out in (found, expected)
    ]
    for ours, true in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        scale = true.float().abs().max()
        rounding = torch.finfo(ours.dtype).eps  # of a result in bf16
        torch.testing.assert_close(
            ours.float() / scale, true.float() / scale, rtol=0, atol=max(tolerance, 2 * rounding)
        )


@pytest.mark.parametrize(("left", "packed"), [(False, False), (True, False), (False, True)])
def test_the_kernel_of_the_convolution_equals_the_plain_form(left, packed):
    pytest.importorskip("causal_conv1d")
    with torch.device("cuda"):
        x, weight, bias = torch.randn(2, 50, 64), torch.randn(64, 4), torch.randn(64)
        before = torch.randn(2, 3, 64) if left else None
        ids = (torch.arange(50) // 20).expand(2, -1) if packed else None
    found = gpu.kernel_conv(x, weight, bias, before, ids)
    torch.testing.assert_close(found, causal_conv(x, weight, bias, before, ids), rtol=1e-3, atol=1e-3)


def test_logits_with_kernels_equal_those_without(model, ids):
    with torch.no_grad():
        expected = model.cuda().lm_head(model(ids.cuda()))
        assert gpu.apply(model)["scan"] in SCANS
        found = model.lm_head(model(ids.cuda()))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


class TestCapture:
    """Decoding steps as CUDA graphs; the static form and what is captured when are tested on the CPU."""

    @staticmethod
    def requests(ids):
        return [
            Request(row[: 5 + 9 * place].tolist(), SamplingParams(max_new_tokens=6 + 50 * place, seed=place))
            for place, row in enumerate(ids)
        ]

    @staticmethod
    def write(model, requests, step, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "prepared", lambda *_: step)
            return [one.token_ids for one in Engine(model, 3, 300, prefix_cache_bytes=0).generate(requests)]

    def test_the_engine_writes_the_same_as_without_graphs(self, model, ids, monkeypatch):
        model = model.cuda().eval()
        captured = prepared(model)
        assert isinstance(captured, CapturedStep)
        expected = self.write(model, self.requests(ids), Step(model), monkeypatch)
        for _ in range(2):  # rows come and go, the memory grows, and comes back for the second call
            assert self.write(model, self.requests(ids), captured, monkeypatch) == expected
        assert any(shape.graph for shape in captured._shapes.values())
        assert not captured._refused

    def test_logits_equal_the_plain_step(self, model, ids):
        model = model.cuda().eval()
        ids, held = ids.cuda(), torch.tensor([5, 20, 13], device="cuda")
        state, expected = (DecodeState.allocate(HYBRID, rows, 128, "cuda") for rows in (5, 3))
        for each in (state.head(3), expected):
            model(ids[:3, :20], state=each, lengths=held.clone())
        step, plain = CapturedStep(model), Step(model)
        for _ in range(6):
            following = ids[:3].gather(1, held[:, None])
            torch.testing.assert_close(step(following, state.head(3)), plain(following, expected), atol=1e-3, rtol=1e-3)
            held = held + 1
        assert state.lengths.tolist() == [*held.tolist(), 0, 0]

    def test_new_weights_after_sync(self, model, ids):
        engine = Engine(model.cuda().eval(), 2, 100)
        request = Request(ids[0, :9].tolist(), SamplingParams(max_new_tokens=20, temperature=0.0))
        engine.generate([request])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(-1.5)
        engine.sync()
        assert engine.generate([request])[0].token_ids == Engine(model, 2, 100).generate([request])[0].token_ids
