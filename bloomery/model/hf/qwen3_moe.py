"""Qwen 3 with experts (arXiv 2505.09388): no shared expert."""

from bloomery.model.hf.transformer import ExpertNames, Transformer

FAMILY = Transformer(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    always={"qk_norm": True},
    optional={"attention_bias": False, "norm_topk_prob": False},
    window="switched",
    experts=ExpertNames(count="num_experts"),
)
