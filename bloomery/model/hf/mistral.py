"""Mistral (arXiv 2310.06825): a Llama with a sliding window in every layer, and no biases."""

from bloomery.model.hf.transformer import Transformer

FAMILY = Transformer(model_type="mistral", architecture="MistralForCausalLM", window="all")
