"""The weights of an engine's model: taken over from a trainer, and told apart."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bloomery.errors import ConfigError


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights`, named as in `model.state_dict()`, into the model, in place.

    Raises `ConfigError`, before anything is copied, for a name that is missing or unknown and for another shape or
    dtype.
    """
    own = model.state_dict()
    for names, word in ((own.keys() - weights.keys(), "missing"), (weights.keys() - own.keys(), "unknown")):
        if names:
            raise ConfigError(
                f"sync: {len(names)} of the weights {'are' if len(names) > 1 else 'is'} {word}, the first is "
                f"{min(names)}; expected exactly the names of model.state_dict()"
            )
    for name, tensor in weights.items():
        found, expected = ((tuple(each.shape), each.dtype) for each in (tensor, own[name]))
        if found != expected:
            raise ConfigError(
                f"sync: {name} is {found[0]} {found[1]}, expected {expected[0]} {expected[1]}; "
                "hand over the weights of the same model, cast to its dtype"
            )
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def fingerprint(model: nn.Module) -> list[tuple[int, int, int]]:
    """Equal as long as the weights are: each tensor's place, its count of changes, and the sum of its bits.

    The count misses what is written through `.data`, which the sum sees.
    """
    return [_fingerprint(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(tensor: Tensor) -> tuple[int, int, int]:
    changes = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), changes, int(tensor.contiguous().view(_INTEGERS[tensor.dtype.itemsize]).sum())
