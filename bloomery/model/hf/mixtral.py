"""Mixtral (arXiv 2401.04088): Mistral's attention, experts in every layer, their weights always summing to one."""

from bloomery.model.hf.transformer import ExpertNames, Transformer

FAMILY = Transformer(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    always={"norm_topk_prob": True},
    window="all",
    rope_theta=1_000_000.0,
    norm_eps=1e-5,
    experts=ExpertNames(
        count="num_local_experts", inner="intermediate_size", module="block_sparse_moe",
        projections=("w1", "w3", "w2"), mixed=False,
    ),
)  # fmt: skip
