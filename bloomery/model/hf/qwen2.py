"""Qwen 2 and 2.5 (arXiv 2407.10671, 2412.15115): biases in q, k and v, none in o."""

from bloomery.model.hf.transformer import Transformer

FAMILY = Transformer(
    model_type="qwen2", architecture="Qwen2ForCausalLM", always={"qkv_bias": True}, window="after",
)  # fmt: skip
