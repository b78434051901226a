"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783)."""

from bloomery.model.hf.transformer import Transformer

FAMILY = Transformer(
    model_type="llama",
    architecture="LlamaForCausalLM",
    optional={"attention_bias": False, "mlp_bias": False},
    fixed={"hidden_act": "silu", "attention_dropout": 0.0, "pretraining_tp": 1},
)
