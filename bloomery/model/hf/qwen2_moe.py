"""Qwen 1.5 and 2 with experts (arXiv 2407.10671): one shared expert, scaled by a gate of its own."""

from bloomery.model.hf.transformer import ExpertNames, Transformer

FAMILY = Transformer(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    optional={"qkv_bias": True, "norm_topk_prob": False},
    window="listed",
    experts=ExpertNames(count="num_experts", shared=True),
)
