"""Prompts with verifiable answers, encoded for generation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bloomery.data.chat import encode_prompt
from bloomery.data.dataset import read_rows
from bloomery.data.document import Drops
from bloomery.data.tokenizer import Message, Tokenizer
from bloomery.errors import ArtifactError


@dataclass(frozen=True)
class Prompt:
    """One row of kind `prompts`, and its token ids up to where the assistant begins.

    domain: what it is about, by its metadata, or else its source; form: `choice` or `open`, by its metadata or
    verifier; options: how many there are to choose from, 0 where that is open or unknown.
    """

    id: str
    source: str
    messages: Sequence[Message]
    answer: str
    verifier: str
    ids: tuple[int, ...]
    domain: str = ""
    form: str = "open"
    options: int = 0


def load_prompts(path: Path, tokenizer: Tokenizer, max_tokens: int, drops: Drops) -> list[Prompt]:
    """All prompts of a dataset folder of at most `max_tokens`, in order. Longer ones are counted in `drops`, not cut.

    Raises `ArtifactError` when none is left, or a prompt has no answer to be judged by.
    """
    prompts = []
    for row in read_rows(path, "prompts"):
        if not row["answer"] or not row["verifier"]:
            missing = "answer" if not row["answer"] else "verifier"
            raise ArtifactError(f"{path}: prompt {row['id']} has no {missing}; every prompt needs one to be judged")
        ids = encode_prompt(tokenizer, row["prompt"])
        if len(ids) > max_tokens:
            drops.add(f"prompt longer than {max_tokens} tokens", row["id"])
            continue
        kind = kind_of_question(json.loads(row["metadata"]), row["source"], row["verifier"])
        own = (row["id"], row["source"], row["prompt"], row["answer"], row["verifier"], tuple(ids))
        prompts.append(Prompt(*own, *kind))
    if not prompts:
        raise ArtifactError(f"{path}: no prompt is left to use; dropped: {drops}")
    return prompts


def kind_of_question(metadata: Mapping[str, Any], source: str, verifier: str) -> tuple[str, str, int]:
    """Domain, form and number of options of a prompt, as `Prompt` has them."""
    form = metadata.get("form") or ("choice" if verifier in ("choice", "label") else "open")
    options = len(metadata.get("options") or ()) if form == "choice" else 0
    return str(metadata.get("domain") or source), str(form), options
