"""Qwen 3 (arXiv 2505.09388): query and key heads are normed, biases only on request."""

from bloomery.model.hf.transformer import Transformer

FAMILY = Transformer(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    always={"qk_norm": True},
    optional={"attention_bias": False},
    window="after",
)
