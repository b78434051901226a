"""Tokens in, tokens out: sampling and continuous batching."""

from bloomery.generate.engine import Engine, EngineStats
from bloomery.generate.request import Completion, Request, Update
from bloomery.generate.sampling import SamplingParams, derive_seed

__all__ = ["Completion", "Engine", "EngineStats", "Request", "SamplingParams", "Update", "derive_seed"]
