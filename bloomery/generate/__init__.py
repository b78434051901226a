"""Tokens in, tokens out: sampling and continuous batching."""

from bloomery.generate.engine import Engine
from bloomery.generate.request import Completion, Request
from bloomery.generate.sampling import SamplingParams, derive_seed

__all__ = ["Completion", "Engine", "Request", "SamplingParams", "derive_seed"]
