"""OpenAI's API in front of an engine: one thread computes, one event loop talks."""

from bloomery.generate.serve.app import ServeLimits, Service
from bloomery.generate.serve.plan import ServedModel
from bloomery.generate.serve.server import address, listen, serve

__all__ = ["ServeLimits", "ServedModel", "Service", "address", "listen", "serve"]
