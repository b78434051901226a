"""Mamba-2 on a GPU: kernels of others where installed, else a form of the scan that torch.compile makes kernels of.

`apply` decides, once, for a whole model. Scans take and give what `ChunkedScan` does, within what their arithmetic
allows: kernels multiply in the type of x (float32 by TF32), so 2e-2 of the largest value in bf16 and 5e-3 in float32;
the compiled form 1e-4. Tensors on a CPU always take the plain form.
"""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bloomery.model.conv import causal_conv
from bloomery.model.mamba import Mamba
from bloomery.model.scan import Scan

_SSD, _GLA, _CONV = "mamba_ssm.ops.triton.ssd_combined", "fla.ops.simple_gla", "causal_conv1d"
_KERNEL_CHUNK = 256  # what the authors of mamba-ssm use on GPUs
_KERNEL_TAPS = (2, 3, 4)
_KERNEL_CHANNELS = 8  # a multiple, for the layout (batch, seq, channels)


def apply(model: nn.Module) -> dict[str, str]:
    """Gives all Mamba-2 layers the fastest installed kernels, for when they run on a GPU; returns their names.

    A scan or convolution that replaced the plain one (another axis, say) is left alone.
    """
    layers = [module for module in model.modules() if isinstance(module, Mamba)]
    scan, conv = best_scan(), best_conv()
    for layer in layers:
        if layer.convolve is causal_conv:
            layer.convolve = conv
        if hasattr(layer.scan, "kernel"):
            layer.scan.kernel = scan
    return {"scan": scan.__name__, "conv": conv.__name__} if layers else {}


def best_scan() -> Scan:
    """mamba-ssm before flash-linear-attention, which needs B and C repeated for every head."""
    if installed(_SSD):
        return mamba_ssm_scan
    return fla_scan if installed(_GLA) else compiled_scan


def best_conv() -> Any:
    """causal-conv1d if there, else the plain form."""
    return kernel_conv if installed(_CONV) else causal_conv


@cache
def installed(name: str) -> Any | None:
    """The module, or `None` when it or a library it needs is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def mamba_ssm_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, segment_ids: Tensor | None,
    initial_state: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mamba_chunk_scan_combined`; y in the type of x. It takes a row's first token to be of document 0."""
    module = installed(_SSD)
    assert module is not None
    documents = None if segment_ids is None else (segment_ids - segment_ids[:, :1]).int().contiguous()
    y, state = module.mamba_chunk_scan_combined(
        x, dt, A, B.to(x.dtype), C.to(x.dtype), _KERNEL_CHUNK, D=D, initial_states=initial_state, seq_idx=documents,
        return_final_states=True,
    )  # fmt: skip
    return y, state.float()


def fla_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, segment_ids: Tensor | None,
    initial_state: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`chunk_simple_gla` with queries C, keys B, values dt·x, gates dt·A. Packed rows become one row with borders."""
    module = installed(_GLA)
    assert module is not None
    query, key = (t.to(x.dtype).repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (C, B))
    given = query, key, (x * dt.unsqueeze(-1)).to(x.dtype), dt * A
    state = None if initial_state is None else initial_state.mT.contiguous()
    if segment_ids is None:
        y, final = module.chunk_simple_gla(*given, scale=1.0, initial_state=state, output_final_state=True)
        return y.float() + D.unsqueeze(-1) * x, final.float().mT
    borders, first, last = _borders(segment_ids)
    if state is not None:
        state = state.new_zeros(len(borders) - 1, *state.shape[1:]).index_copy(0, first, state)
    y, final = module.chunk_simple_gla(
        *(t.flatten(0, 1)[None] for t in given), scale=1.0, initial_state=state, output_final_state=True,
        cu_seqlens=borders,
    )  # fmt: skip
    return y[0].view(x.shape).float() + D.unsqueeze(-1) * x, final[last].float().mT


def _borders(segment_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows laid end to end: where documents begin and the last one ends; each row's first and last document."""
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts, after = begins.flatten().nonzero().squeeze(1), begins.sum(1).cumsum(0)
    return F.pad(starts, (0, 1), value=segment_ids.numel()), after - begins.sum(1), after - 1


def compiled_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, segment_ids: Tensor | None,
    initial_state: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`plain_scan` through torch.compile, a group of heads at a time and recomputed in the backward, for its memory."""
    groups = B.shape[2]
    if initial_state is None:
        initial_state = x.new_zeros(len(x), *x.shape[2:], B.shape[-1], dtype=torch.float32)
    parts = zip(
        x.chunk(groups, 2), dt.chunk(groups, 2), A.chunk(groups), B.unbind(2), C.unbind(2), D.chunk(groups),
        initial_state.chunk(groups, 1), strict=True,
    )  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        found = [checkpoint(_compiled(), *part, segment_ids, chunk_size, use_reentrant=False) for part in parts]
    return torch.cat([y for y, _ in found], 2), torch.cat([state for _, state in found], 1)


@cache
def _compiled() -> Any:
    return torch.compile(plain_scan, dynamic=False)


def plain_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor, segment_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked scan of one group as ordinary differentiable operations: x (batch, seq, heads, head_dim), dt (batch,
    seq, heads), B and C (batch, seq, state), otherwise as `ChunkedScan`. For a compiler to fuse; slower without one."""
    batch, seq = x.shape[:2]
    missing = -seq % chunk_size
    ids = torch.zeros(batch, seq, dtype=torch.int32, device=x.device) if segment_ids is None else segment_ids
    ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, chunk_size))
    x, dt, B, C = (
        F.pad(t.float(), (0, 0) * (t.dim() - 2) + (0, missing)).unflatten(1, (-1, chunk_size)) for t in (x, dt, B, C)
    )
    within = ids[:, :, :, None] == ids[:, :, None, :]
    c = (within.tril().double() @ (dt * A).double()).transpose(2, 3)  # (batch, chunks, heads, Q), within the document
    last = ids[:, :, -1]
    before = torch.cat([ids[:, :1, 0], last[:, :-1]], 1)
    to_end = (c[..., -1:] - c).clamp(max=0).float().exp() * (ids == last[..., None]).unsqueeze(2)
    from_start = c.float().exp() * (ids == before[..., None]).unsqueeze(2)
    through = from_start[..., -1] * (last == before)[..., None]
    decay = (c[..., :, None] - c[..., None, :]).clamp(max=0).float().exp()
    u = dt[..., None] * x
    scores = (C @ B.mT * within.tril()).unsqueeze(2) * decay  # (batch, chunks, heads, Q, Q)
    inside = scores @ u.transpose(2, 3)
    added = (u * to_end.transpose(2, 3)[..., None]).permute(0, 1, 3, 4, 2) @ B.unsqueeze(2)
    states = [initial]
    for chunk in range(x.shape[1]):
        states.append(states[-1] * through[:, chunk, :, None, None] + added[:, chunk])
    outside = C.unsqueeze(2) @ torch.stack(states[:-1], 1).mT * from_start[..., None]
    y = (inside + outside).transpose(2, 3) + D[:, None] * x
    return y.flatten(1, 2)[:, :seq], states[-1]


def kernel_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """`causal_conv` by the kernel on a GPU, for what the kernel takes."""
    fits = weight.shape[1] in _KERNEL_TAPS and x.shape[-1] % _KERNEL_CHANNELS == 0
    if x.device.type == "cpu" or not fits or (left is not None and segment_ids is not None):
        return causal_conv(x, weight, bias, left, segment_ids)
    return causal_conv1d(x, weight, bias, left, segment_ids)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor | None, segment_ids: Tensor | None
) -> Tensor:
    """`causal_conv1d_fn`, whose layout is (batch, channels, seq); not both of `left` and `segment_ids`."""
    module = installed(_CONV)
    assert module is not None
    out = module.causal_conv1d_fn(
        x.transpose(1, 2), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), activation="silu",
        seq_idx=None if segment_ids is None else segment_ids.int().contiguous(),
        initial_states=None if left is None else left.to(x.dtype).contiguous().transpose(1, 2),
    )  # fmt: skip
    return out.transpose(1, 2)
