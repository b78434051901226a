"""Does an exported folder, loaded by `transformers`, do what our model does? Compared number by number."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bloomery.data.chat import encode_prompt
from bloomery.data.tokenizer import Message, Tokenizer
from bloomery.errors import ArtifactError
from bloomery.generate import Engine, Request, SamplingParams
from bloomery.model import hf
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder


@dataclass(frozen=True)
class LogitDifference:
    """Absolute differences of fp32 logits over all positions of all prompts."""

    max: float
    mean: float


@dataclass(frozen=True)
class Difference:
    """Of two models on the same tokens.

    Attributes:
        max, mean: absolute differences of fp32 logits.
        kl: mean over positions of KL(first ‖ second), nats.
        first_layer: the first layer, counted as in the pattern, after which the hidden states differ by more than
            `LAYER_TOLERANCE` of their largest value (at least 1); `None` where none does.
    """

    max: float
    mean: float
    kl: float
    first_layer: int | None


@dataclass(frozen=True)
class Trace:
    """`layers`: hidden states (tokens, hidden) after each residual layer or block; `logits` (tokens, vocab)."""

    layers: list[torch.Tensor]
    logits: torch.Tensor


LAYER_TOLERANCE = 1e-4


def load_peer(folder: Path) -> Any:
    """The folder as `transformers` loads it, in fp32. `ArtifactError` when it misses, ignores or reshapes a tensor."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # its advice is for those who run the model there
    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    peer, found = loader.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )  # the grouped product of others refuses sizes that are no multiple of 16 bytes
    problems = {name: sorted(map(str, value)) for name, value in found.items() if value}
    if problems:
        raise ArtifactError(f"{folder}: transformers does not take every tensor as it is: {problems}")
    return peer.eval()


def require_equal_weights(source: Path, exported: Path, dtype: torch.dtype) -> None:
    """Every tensor of the export is the source's, rounded to `dtype` at most."""
    ours, theirs = hf.load(source, torch.float32).state_dict(), hf.load(exported, torch.float32).state_dict()
    changed = [name for name in ours if not torch.equal(_rounded(ours[name], dtype), _rounded(theirs[name], dtype))]
    if changed or ours.keys() != theirs.keys():
        names = changed or sorted(ours.keys() ^ theirs.keys())
        raise ArtifactError(f"{exported}: {len(names)} tensors differ from {source}, the first is {names[0]}")


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).float()


def require_equal_tokenizer(folder: Path, tokenizer: Tokenizer, chats: Sequence[Sequence[Message]]) -> None:
    """`transformers.AutoTokenizer` renders and encodes every chat as ours does."""
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(folder)
    for chat in chats:
        messages = [{"role": message["role"], "content": message["content"]} for message in chat]
        theirs = peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ours = encode_prompt(tokenizer, messages)
        if list(theirs) != ours:
            raise ArtifactError(
                f"{folder}: transformers encodes {messages[-1]['content'][:60]!r} as {list(theirs)[:20]}, we as "
                f"{ours[:20]}; the chat template or the tokenizer's settings do not survive the export"
            )


@torch.no_grad()
def compare_logits(model: Decoder, peer: Any, prompts: Sequence[Sequence[int]]) -> LogitDifference:
    """Both models on each prompt alone, in fp32 on the CPU."""
    largest, total, count = 0.0, 0.0, 0
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        difference = (model.lm_head(model(ids)) - peer(ids).logits).abs()
        largest = max(largest, difference.max().item())
        total, count = total + difference.double().sum().item(), count + difference.numel()
    return LogitDifference(largest, total / count)


def probe_tokens(config: ModelConfig) -> torch.Tensor:
    """(1, tokens) random ids: more than two chunks of the scan, where that fits the model's context."""
    length = min(max(64, 2 * config.chunk_size + 5), config.max_position_embeddings)
    return torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def trace(model: Any, ids: torch.Tensor) -> Trace:
    """What a decoder of ours, or a peer from `load_peer`, computes for `ids` (1, tokens), layer by layer."""
    ours = isinstance(model, Decoder)
    blocks = model.layers if ours else getattr(model, model.base_model_prefix).layers
    layers: list[torch.Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        layers.append((out[0] if isinstance(out, tuple) else out)[0].float().clone())

    hooks = [block.register_forward_hook(keep) for block in blocks]
    logits = model.lm_head(model(ids)) if ours else model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return Trace(layers, logits[0].float())


def compare_traces(one: Trace, other: Trace) -> Difference:
    """Where a block of one holds several layers of the other, they are compared at the block's end."""
    count = min(len(one.layers), len(other.layers))
    ends = [trace.layers[len(trace.layers) // count - 1 :: len(trace.layers) // count] for trace in (one, other)]
    size = max(len(one.layers), len(other.layers)) // count
    apart = (number for number, pair in enumerate(zip(*ends, strict=True)) if _apart(*pair))
    first = next(apart, None)
    difference = (one.logits - other.logits).abs()
    log_p, log_q = one.logits.double().log_softmax(-1), other.logits.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return Difference(
        difference.max().item(), difference.mean().item(), kl, None if first is None else (first + 1) * size - 1
    )


def _apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    bound = LAYER_TOLERANCE * max(1.0, one.abs().max().item())
    return not (one - other).abs().max().item() <= bound  # a NaN is apart too


def require_equal_greedy(
    model: Decoder, peer: Any, prompts: Sequence[Sequence[int]], stops: Sequence[int], max_new_tokens: int,
    margin: float,
) -> int:  # fmt: skip
    """Our engine and `transformers.generate` continue every prompt alike, token by token; the number compared.

    Where both tokens' logits lie within `margin` of each other, neither is wrong, and the rest of that text is not
    compared. Raises `ArtifactError` for any other difference, naming prompt and position.
    """
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0, stop_token_ids=tuple(stops), logprobs=False)
    engine = Engine(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    compared = 0
    for number, completion in enumerate(engine.generate([Request(prompt, params) for prompt in prompts])):
        prompt, ours = list(prompts[number]), completion.token_ids
        theirs = _peer_greedy(peer, prompt, max_new_tokens)
        place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if place is None and len(ours) != len(theirs):
            raise ArtifactError(f"prompt {number}: our text ends after {len(ours)} tokens, transformers' {len(theirs)}")
        if place is not None and _distance(model, prompt + ours[:place], ours[place], theirs[place]) > margin:
            raise ArtifactError(
                f"prompt {number}: token {place} of the greedy text is {ours[place]} in our engine and {theirs[place]} "
                f"in transformers; ours goes on {ours[place : place + 8]}, theirs {theirs[place : place + 8]}"
            )
        compared += len(ours) if place is None else place
    return compared


def _peer_greedy(peer: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Stops where the exported `generation_config.json` says, as for anyone who downloads the folder."""
    ids = torch.tensor([prompt])
    written = peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
    return written[0, len(prompt) :].tolist()


@torch.no_grad()
def _distance(model: Decoder, prefix: list[int], one: int, other: int) -> float:
    logits = model.lm_head(model(torch.tensor([prefix]))[:, -1])[0]
    return (logits[one] - logits[other]).abs().item()
