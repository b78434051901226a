"""The chunked scan and the convolution against what they mean: one token after the other."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model.conv import causal_conv
from bloomery.model.scan import ChunkedScan

CHUNK, WIDTH = 8, 4
LENGTHS = (1, WIDTH - 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, segment_ids: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt·A)·S + dt·x ⊗ B, y = S·C + D·x, the state forgotten where the document changes."""
    shared = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(shared, 2), C.repeat_interleave(shared, 2)
    outputs = []
    for t in range(x.shape[1]):
        if segment_ids is not None and t:
            state = state * (segment_ids[:, t] == segment_ids[:, t - 1]).to(state.dtype)[:, None, None, None]
        state = (
            state * (dt[:, t] * A).exp()[..., None, None] + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        )
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def arguments(seq: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(seq)
    batch, heads, head_dim, state = 2, 4, 3, 5
    shapes = [(batch, seq, heads, head_dim), (batch, seq, heads), (heads,), (batch, seq, groups, state),
              (batch, seq, groups, state), (heads,), (batch, heads, head_dim, state)]  # fmt: skip
    drawn = [torch.randn(shape, dtype=dtype) for shape in shapes]
    drawn[1], drawn[2] = F.softplus(drawn[1]), -drawn[2].exp() * 4
    return [t.requires_grad_() for t in drawn]


def documents(seq: int) -> Tensor:
    """A document of one token, a boundary at, before and after a chunk's edge, one that spans a chunk."""
    first = torch.zeros(seq, dtype=torch.int32)
    for boundary in (1, CHUNK, 3 * CHUNK - 1):
        first[boundary:] += 1
    second = torch.zeros(seq, dtype=torch.int32)
    for boundary in (CHUNK - 1, CHUNK + 1, CHUNK + 2):
        second[boundary:] += 1
    return torch.stack([first, second])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunks_equal_the_recurrence(seq: int, groups: int, packed: bool, dtype: torch.dtype, tolerance: float) -> None:
    given = arguments(seq, groups, dtype)
    exact = [t.detach().double().requires_grad_() for t in given]
    segment_ids = documents(seq) if packed else None
    found = ChunkedScan(CHUNK)(*given[:6], segment_ids, given[6])
    expected = recurrence(*exact[:6], segment_ids, exact[6])
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=tolerance, atol=tolerance)
    weights = [torch.randn_like(t) for t in expected]
    torch.autograd.backward(found, [w.to(dtype) for w in weights])
    torch.autograd.backward(expected, weights)
    for ours, true in zip(given, exact, strict=True):
        scale = true.grad.abs().max().clamp(min=1)
        torch.testing.assert_close(ours.grad.double() / scale, true.grad / scale, rtol=0, atol=10 * tolerance)


def test_strong_decay_loses_no_precision() -> None:
    """Differences of running sums would: here c reaches −16·64, and neighbours differ by less than its rounding."""
    torch.manual_seed(0)
    given = [t.detach() for t in arguments(128, 1, torch.float32)]
    given[1][:] = 1.0
    given[1][:, 1::2] = 1e-4
    given[2][:] = -16.0
    found, _ = ChunkedScan(64)(*given[:6], None, given[6])
    expected, _ = recurrence(*(t.double() for t in given[:6]), None, given[6].double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_zero_time_step_leaves_the_state_alone() -> None:
    given = [t.detach() for t in arguments(11, 1, torch.float32)]
    given[1][:, 6:] = 0
    _, state = ChunkedScan(CHUNK)(*given[:6], None, given[6])
    _, expected = ChunkedScan(CHUNK)(*(t[:, :6] if t.dim() > 1 else t for t in given[:6]), None, given[6])
    torch.testing.assert_close(state, expected)


def slow_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor | None, segment_ids: Tensor | None
) -> Tensor:
    out = torch.zeros_like(x)
    width = weight.shape[1]
    for t in range(x.shape[1]):
        for back in range(width):
            if t - back >= 0:
                past = x[:, t - back]
                if segment_ids is not None:
                    past = past * (segment_ids[:, t - back] == segment_ids[:, t]).unsqueeze(-1)
            elif left is not None:
                past = left[:, t - back]
                if segment_ids is not None:
                    past = past * (segment_ids[:, 0] == segment_ids[:, t]).unsqueeze(-1)
            else:
                continue
            out[:, t] += past * weight[:, width - 1 - back]
    return F.silu(out if bias is None else out + bias)


@pytest.mark.parametrize(
    ("bias", "left", "packed"), [(True, False, False), (False, True, False), (True, True, True), (True, False, True)]
)
@pytest.mark.parametrize("seq", [1, 2, 3, 9])
def test_convolution_equals_its_definition(seq: int, bias: bool, left: bool, packed: bool) -> None:
    torch.manual_seed(seq)
    x, weight = torch.randn(2, seq, 5, dtype=torch.float64), torch.randn(5, WIDTH, dtype=torch.float64)
    offset = torch.randn(5, dtype=torch.float64) if bias else None
    before = torch.randn(2, WIDTH - 1, 5, dtype=torch.float64) if left else None
    ids = torch.randint(0, 2, (2, seq)).cumsum(1) if packed else None
    tensors = [t.requires_grad_() for t in (x, weight, offset, before) if t is not None]
    found, expected = causal_conv(x, weight, offset, before, ids), slow_conv(x, weight, offset, before, ids)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for ours, true in zip(
        torch.autograd.grad(found, tensors, weights), torch.autograd.grad(expected, tensors, weights), strict=True
    ):
        torch.testing.assert_close(ours, true)
