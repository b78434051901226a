"""The chunked scan and the convolution against what they mean: one token after the other."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bloomery.model import scan
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


def test_one_document_leaves_no_trace_in_the_next() -> None:
    """Not one bit, though both are in one chunk and share sums of dt·A; and no gradient comes back."""
    given = arguments(3 * CHUNK, 2, torch.float32)
    segment_ids = (torch.arange(3 * CHUNK) >= CHUNK + 3).int().expand(2, -1)
    outputs = []
    for time_step in (0.3, 0.7123):
        changed = [t.detach().clone().requires_grad_() for t in given]
        with torch.no_grad():
            changed[1][:, CHUNK + 2] = time_step
        y, state = ChunkedScan(CHUNK)(*changed[:6], segment_ids, changed[6])
        outputs.append(torch.cat([y[:, CHUNK + 3 :].flatten(), state.flatten()]))
    assert torch.equal(*outputs)
    outputs[1].sum().backward()
    for t in (changed[0], changed[1], changed[3], changed[4]):
        assert not t.grad[:, : CHUNK + 3].any()


@pytest.mark.parametrize("packed", [False, True])
def test_memory_does_not_grow_with_heads_times_chunk(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """Kept for the backward: inputs, outputs, states at chunk borders, a mask of documents. Made in between: no more
    than a block. (batch · tokens · chunk · heads) floats, which the plain form of the paper makes, are nowhere."""
    monkeypatch.setitem(scan._BLOCK_ELEMENTS, "cpu", 2 * 8 * 16 * 16)  # two chunks
    batch, seq, heads, head_dim, groups, state, chunk = 2, 128, 8, 4, 2, 4, 16
    x = torch.randn(batch, seq, heads, head_dim, requires_grad=True)
    dt = torch.rand(batch, seq, heads, requires_grad=True)
    B, C = (torch.randn(batch, seq, groups, state, requires_grad=True) for _ in range(2))
    A, D = -torch.rand(heads), torch.ones(heads)
    segment_ids = (torch.arange(seq) // 50).expand(batch, -1) if packed else None
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with Allocations() as made:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y, _ = ChunkedScan(chunk)(x, dt, A, B, C, D, segment_ids)
        y.sum().backward()
    inputs = 4 * (2 * x.numel() + dt.numel() + 2 * B.numel() + 2 * heads)  # x and y
    states = 4 * batch * (seq // chunk + 1) * heads * head_dim * state
    assert sum(saved.values()) == inputs + states
    assert made.largest == x.numel() < batch * seq * chunk * heads


class Allocations(TorchDispatchMode):
    """The elements of the largest tensor that any operation inside returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return result


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
