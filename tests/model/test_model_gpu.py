"""What a GPU runs, on a CPU: arguments given to kernels, by stand-ins that read them as the kernels do, and the form
that is compiled, not compiled. That the kernels themselves agree, `tests/test_gpu.py` asks on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model import gpu
from bloomery.model.config import ModelConfig
from bloomery.model.conv import causal_conv
from bloomery.model.decoder import Decoder
from bloomery.model.scan import ChunkedScan

SEQ, CHUNK = 21, 8


def recur(x: Tensor, log_decay: Tensor, keys: Tensor, queries: Tensor, ids: Tensor, before: Tensor, state: Tensor):
    """S = exp(g)·S + x ⊗ k, y = S·q by tokens, the state forgotten where the id is not that before."""
    outputs = []
    for t in range(x.shape[1]):
        state = state * (ids[:, t] == before).to(x.dtype)[:, None, None, None]
        state = state * log_decay[:, t].exp()[..., None, None] + x[:, t, :, :, None] * keys[:, t, :, None]
        outputs.append((state * queries[:, t, :, None]).sum(-1))
        before = ids[:, t]
    return torch.stack(outputs, 1), state


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False,
):  # fmt: skip
    assert chunk_size == 256
    assert z is dt_bias is None
    assert not dt_softplus
    assert return_final_states
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    shared = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(shared, 2), C.repeat_interleave(shared, 2)
    ids = torch.zeros(x.shape[:2], dtype=torch.int32) if seq_idx is None else seq_idx
    state = x.new_zeros(len(x), *x.shape[2:], B.shape[-1]) if initial_states is None else initial_states
    y, state = recur(x * dt[..., None], dt * A, B, C, ids, torch.zeros(len(x), dtype=torch.int32), state)
    return y + D[:, None] * x, state


def chunk_simple_gla(q, k, v, g=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert output_final_state
    borders = [(row, 0, q.shape[1]) for row in range(len(q))]
    if cu_seqlens is not None:
        assert len(q) == 1
        borders = [(0, *pair) for pair in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    outputs, states = torch.empty_like(v), []
    for number, (row, start, end) in enumerate(borders):
        part = slice(row, row + 1), slice(start, end)
        state = v.new_zeros(1, v.shape[2], v.shape[3], k.shape[3])
        if initial_state is not None:
            state = initial_state[number : number + 1].mT
        ids = torch.zeros(1, end - start)
        outputs[part], state = recur(v[part], g[part], k[part], scale * q[part], ids, ids[:, 0], state)
        states.append(state.mT)
    return outputs, torch.cat(states)


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    assert activation == "silu"
    assert x.stride(1) == 1
    assert seq_idx is None or (initial_states is None and seq_idx.dtype == torch.int32)
    width = weight.shape[1] - 1
    left = x.new_zeros(*x.shape[:2], width) if initial_states is None else initial_states
    columns = torch.cat([left, x], 2).unfold(2, width + 1, 1)
    if seq_idx is not None:
        ids = F.pad(seq_idx, (width, 0), value=-1).unfold(1, width + 1, 1)
        columns = columns * (ids == seq_idx[..., None])[:, None]
    out = (columns * weight[:, None]).sum(-1)
    return F.silu(out if bias is None else out + bias[:, None])


STAND_INS = {
    gpu._SSD: SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined),
    gpu._GLA: SimpleNamespace(chunk_simple_gla=chunk_simple_gla),
    gpu._CONV: SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn),
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them installed, and nothing compiled."""
    monkeypatch.setattr(gpu, "installed", STAND_INS.get)
    monkeypatch.setattr(gpu, "_compiled", lambda: gpu.plain_scan)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scan", [gpu.mamba_ssm_scan, gpu.fla_scan, gpu.compiled_scan])
def test_kernels_are_given_what_they_expect(scan, packed: bool, started: bool) -> None:
    torch.manual_seed(0)
    batch, heads, head_dim, groups, state = 2, 4, 3, 2, 5
    x, dt = torch.randn(batch, SEQ, heads, head_dim), F.softplus(torch.randn(batch, SEQ, heads))
    B, C = (torch.randn(batch, SEQ, groups, state) for _ in range(2))
    given = [x, dt, -torch.rand(heads) * 4, B, C, torch.randn(heads)]
    given = [t.requires_grad_() for t in given]
    ids = torch.stack(
        [(torch.arange(SEQ) >= 5).int() + 3, (torch.arange(SEQ) >= 8).int() * 2 + (torch.arange(SEQ) > 8)]
    )
    initial = torch.randn(batch, heads, head_dim, state) if started else None
    segment_ids = ids if packed else None
    outputs = [scan(*given, segment_ids, initial, CHUNK), ChunkedScan(CHUNK)(*given, segment_ids, initial)]
    weights = [torch.randn_like(t) for t in outputs[0]]
    gradients = [torch.autograd.grad(output, given, weights) for output in outputs]
    for found, expected in zip((*outputs[0], *gradients[0]), (*outputs[1], *gradients[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("left", "packed", "bias"), [(False, False, True), (True, False, False), (False, True, True)])
def test_the_convolution_is_given_what_it_expects(left: bool, packed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, SEQ, 8), torch.randn(8, 4)
    offset, before = torch.randn(8) if bias else None, torch.randn(2, 3, 8) if left else None
    ids = (torch.arange(SEQ) >= 5).long().expand(2, -1) if packed else None
    found = gpu.causal_conv1d(x, weight, offset, before, ids)
    torch.testing.assert_close(found, causal_conv(x, weight, offset, before, ids))


def test_apply_takes_what_is_installed_and_changes_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        pattern="M-M", vocab_size=31, hidden_size=16, intermediate_size=16, mamba_num_heads=2, mamba_head_dim=8,
        ssm_state_size=4,
    )  # fmt: skip
    model, ids = Decoder(config), torch.arange(9)[None]
    expected = model(ids)
    monkeypatch.setattr(gpu, "installed", {}.get)
    assert gpu.apply(model) == {"scan": "compiled_scan", "conv": "causal_conv"}
    monkeypatch.setattr(gpu, "installed", {gpu._GLA: STAND_INS[gpu._GLA]}.get)
    assert gpu.apply(model) == {"scan": "fla_scan", "conv": "causal_conv"}
    monkeypatch.setattr(gpu, "installed", STAND_INS.get)
    assert gpu.apply(model) == {"scan": "mamba_ssm_scan", "conv": "kernel_conv"}
    assert model.layers[0].mixer.scan.kernel is gpu.mamba_ssm_scan
    assert torch.equal(model(ids), expected)
    assert gpu.apply(torch.nn.Linear(2, 2)) == {}


@pytest.mark.slow
def test_the_compiled_form_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward through torch.compile, without the code generator."""
    compiled = torch.compile(gpu.plain_scan, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(gpu, "_compiled", lambda: compiled)
    x, dt, B, C = torch.randn(1, 20, 2, 4), torch.rand(1, 20, 2), torch.randn(1, 20, 1, 4), torch.randn(1, 20, 1, 4)
    given = [t.requires_grad_() for t in (x, dt, -torch.rand(2), B, C, torch.ones(2))]
    ids = (torch.arange(20) >= 11).int()[None]
    found, expected = gpu.compiled_scan(*given, ids, None, CHUNK)[0], ChunkedScan(CHUNK)(*given, ids)[0]
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, given, weights) for y in (found, expected)]
    for ours, true in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)
