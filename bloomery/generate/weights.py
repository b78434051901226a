"""The weights of an engine's model: taken over from a trainer, and told apart."""

from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor, nn

from bloomery.errors import ConfigError

Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""By name; or one after another, of a model that many processes hold in parts and nobody whole."""


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Weights) -> None:
    """Copy `weights` into the model, in place: a mapping named as in `model.state_dict()`, or (name, tensor) pairs as
    they come, each let go before the next; of weights tied under two names, the first alone.

    Raises `ConfigError` for a name that is missing or unknown and for another shape or dtype: of a mapping before
    anything is copied, of pairs at the first that does not fit and at their end.
    """
    if isinstance(weights, Mapping):
        own = model.state_dict()
        _require_names(own.keys() - weights.keys(), weights.keys() - own.keys())
        for name, tensor in weights.items():
            _require_alike(name, tensor, own[name])
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        return
    missing = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    own = model.state_dict() | dict(model.named_buffers())
    for name, tensor in weights:
        _require_names(set(), {name} - own.keys())
        _require_alike(name, tensor, own[name])
        own[name].copy_(tensor)
        missing.discard(name)
    _require_names(missing, set())


def _require_names(missing: Set[str], unknown: Set[str]) -> None:
    for names, word in ((missing, "missing"), (unknown, "unknown")):
        if names:
            raise ConfigError(
                f"sync: {len(names)} of the weights {'are' if len(names) > 1 else 'is'} {word}, the first is "
                f"{min(names)}; expected exactly the names of model.state_dict()"
            )


def _require_alike(name: str, tensor: Tensor, own: Tensor) -> None:
    found, expected = ((tuple(each.shape), each.dtype) for each in (tensor, own))
    if found != expected:
        raise ConfigError(
            f"sync: {name} is {found[0]} {found[1]}, expected {expected[0]} {expected[1]}; "
            "hand over the weights of the same model, cast to its dtype"
        )


def fingerprint(model: nn.Module) -> list[tuple[int, int, int]]:
    """Equal as long as the weights are: each tensor's place, its count of changes, and the sum of its bits.

    The count misses what is written through `.data`, which the sum sees.
    """
    return [_fingerprint(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(tensor: Tensor) -> tuple[int, int, int]:
    changes = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), changes, int(tensor.contiguous().view(_INTEGERS[tensor.dtype.itemsize]).sum())
