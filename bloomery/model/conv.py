"""The short causal convolution of Mamba-2 over the channels' own past, in the (batch, seq, channels) layout."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """SiLU(bias + Σ_k weight[:, k]·x_{t−(K−1)+k}), (batch, seq, channels) like x.

    `weight` (channels, K): the last tap multiplies the current token. `left` (batch, K − 1, channels) is what came
    before (zeros when absent). With `segment_ids` (batch, seq) a tap counts only inside the token's own document.
    """
    width = weight.shape[1] - 1
    padded = F.pad(x, (0, 0, width, 0)) if left is None else torch.cat([left, x], dim=1)
    ids = None if segment_ids is None else torch.cat([segment_ids[:, :1].expand(-1, width), segment_ids], dim=1)
    seq = x.shape[1]
    out = x * weight[:, width] if bias is None else torch.addcmul(bias, x, weight[:, width])
    for tap in range(width):
        past = padded[:, tap : tap + seq]
        if ids is not None:
            past = past * (ids[:, tap : tap + seq] == segment_ids).unsqueeze(-1)
        out = torch.addcmul(out, past, weight[:, tap])
    return F.silu(out)
