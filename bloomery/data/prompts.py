"""Prompts with verifiable answers, encoded for generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bloomery.data.chat import encode_prompt
from bloomery.data.dataset import read_rows
from bloomery.data.document import Drops
from bloomery.data.tokenizer import Message, Tokenizer
from bloomery.errors import ArtifactError


@dataclass(frozen=True)
class Prompt:
    """One row of kind `prompts`, and its token ids up to where the assistant begins."""

    id: str
    source: str
    messages: Sequence[Message]
    answer: str
    verifier: str
    ids: tuple[int, ...]


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
        prompts.append(Prompt(row["id"], row["source"], row["prompt"], row["answer"], row["verifier"], tuple(ids)))
    if not prompts:
        raise ArtifactError(f"{path}: no prompt is left to use; dropped: {drops}")
    return prompts
