"""A model folder behind OpenAI's API: tokenizer, chat template and engine put together."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from bloomery.data.chat import encode_prompt, stop_token_ids
from bloomery.data.tokenizer import Tokenizer
from bloomery.generate import Engine
from bloomery.generate.serve import ServedModel, ServeLimits, Service
from bloomery.model import hf
from bloomery.train.model_folder import ModelFolder, open_model, placed


def open_service(
    path: Path, *, limits: ServeLimits | None = None, max_batch: int = 16, max_tokens: int | None = None,
    name: str | None = None, api_key: str | None = None,
) -> Service:  # fmt: skip
    """The service of a model folder, its weights loaded.

    `max_tokens` is the longest prompt with its completion; default: the model's context. `name` is what clients call
    the model; default: its folder's name.
    """
    folder = open_model(path)
    window = min(max_tokens or folder.config.max_position_embeddings, folder.config.max_position_embeddings)
    served = describe(folder, name or Path(path).resolve().name, window)
    engine = Engine(placed(hf.load(folder.path)), max_batch=max_batch, max_tokens=window, decode=served.decode)
    return Service(engine, served, limits or ServeLimits(), api_key)


def describe(folder: ModelFolder, name: str, window: int) -> ServedModel:
    """What the server must know of a model folder."""
    tokenizer = folder.tokenizer

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return ServedModel(
        name=name, encode=lambda text: _begin(tokenizer) + tokenizer.encode(text), decode=decode,
        spell=lru_cache(maxsize=2**16)(lambda token: tokenizer.decode([token])),
        render_chat=(lambda messages: encode_prompt(tokenizer, messages)) if tokenizer.chat_template else None,
        stop_token_ids=tuple(stop_token_ids(tokenizer)), vocab_size=folder.config.vocab_size, window=window,
    )  # fmt: skip


def _begin(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text."""
    begin = tokenizer.bos_token_id
    return [begin] if tokenizer.adds_bos and begin is not None else []
