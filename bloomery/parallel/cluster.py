"""What a cluster can do: arithmetic, memory and links of its devices, from data sheets."""

import difflib
import re
from dataclasses import dataclass

from bloomery.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """A GPU in a node of eight. Rates per second and GPU; `link` to the same node and `network` are one direction.

    memory: bytes that a program sees. peak: dense bf16 operations.
    """

    peak: float
    memory: float
    memory_rate: float
    link: float
    network: float


DEVICES = {
    "A100": Device(312e12, 80e9, 2.04e12, 300e9, 25e9),
    "H100": Device(989.5e12, 80e9, 3.35e12, 450e9, 50e9),
    "H200": Device(989.5e12, 141e9, 4.8e12, 450e9, 50e9),
    "B200": Device(2250e12, 180e9, 7.7e12, 900e9, 50e9),
}
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Cluster:
    """`gpus` devices of one kind, filled node by node in the order of ranks."""

    name: str
    gpus: int
    device: Device
    gpus_per_node: int = GPUS_PER_NODE


def parse(text: str) -> Cluster:
    """The cluster that `128xH100` names. Raises `ConfigError` with the nearest name for another device."""
    match = re.fullmatch(r"(\d+)\s*[x×*]\s*([\w-]+)", text.strip())
    if not match or int(match[1]) < 1:
        raise ConfigError(f"--cluster {text!r}: expected a number of GPUs and their kind, for example 128xH100")
    known = {name.lower(): name for name in DEVICES}
    name = match[2].lower()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {match[1]}x{known[nearest[0]]}?" if nearest else f"known: {', '.join(DEVICES)}"
        raise ConfigError(f"--cluster {text!r}: {match[2]!r} is no GPU known here; {hint}")
    return Cluster(f"{match[1]}x{known[name]}", int(match[1]), DEVICES[known[name]])
