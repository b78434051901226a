"""Small random decoders of every kind of memory, with logits that have some preference, so that errors show."""

import torch

from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder

VOCAB = 97
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
CONFIGS = {
    "hybrid": ModelConfig(pattern="M-M*-M-", **SIZES, **ATTENTION, **MAMBA),
    "mamba": ModelConfig(pattern="M-M-", **SIZES, **MAMBA),
    "attention": ModelConfig(pattern="*-*-", **SIZES, **ATTENTION),
    "rope": ModelConfig(
        family="llama", pattern="*-*-", mlp_hidden_act="silu", mlp_gated=True, rope=RopeConfig(), **SIZES, **ATTENTION
    ),
    "window": ModelConfig(pattern="*-*-", sliding_window=40, rope=RopeConfig(), **SIZES, **ATTENTION),
}


def tiny(kind: str) -> Decoder:
    """A model of this kind, always the same."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIGS[kind])
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4
    return decoder.eval()


def tokens(count: int, seed: int = 0) -> list[int]:
    """So many random tokens."""
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
