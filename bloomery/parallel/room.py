"""Whether the rows that come to a rank's experts fit into its memory, known before any of them is allocated."""

import sys

import numpy as np
import torch

from bloomery.errors import BloomeryError
from bloomery.model.moe import Experts
from bloomery.parallel.collectives import Group, gather_whole

_GROWTH = 1.25


class Room:
    """Called with the rows that each rank of `group` will have, on all of them with the same numbers.

    Free memory is asked for only when the most rows of a rank are a quarter more than ever before; then all ranks look
    at all ranks' free memory, so that they agree.
    """

    def __init__(self, experts: Experts, group: Group):
        self._experts, self._group, self._most = experts, group, 0.0

    def __call__(self, rows: np.ndarray, local_experts: int) -> None:
        """Raises `BloomeryError` on all ranks when one cannot hold its rows, their inner activations and outputs."""
        if rows.max() <= self._most * _GROWTH:
            return
        free = gather_whole(self._free()[None], 0, self._group).cpu().numpy()
        needed = rows * self._row_bytes()
        short = np.flatnonzero(needed > free)
        if len(short):
            worst = int(short[np.argmax(needed[short])])
            raise BloomeryError(
                f"experts: rank {worst} of {len(rows)} that share the experts would get {int(rows[worst])} rows, "
                f"{rows[worst] / rows.mean():.1f} times the mean, for {local_experts} experts: "
                f"{needed[worst] / 2**30:.2f} GiB, but {free[worst] / 2**30:.2f} GiB are free; set capacity_factor, "
                "balance the load (balance.weight, balance.bias_rate), or use smaller micro-batches"
            )
        self._most = float(rows.max())

    def _row_bytes(self) -> int:
        """Of a row: input and output, twice for their sorted copies, and the inner activations."""
        weight = self._experts.up_proj
        inner, width = weight.shape[1:]
        matrices = 2 if self._experts.gate_proj is None else 3
        return (4 * width + matrices * inner) * weight.element_size()

    def _free(self) -> torch.Tensor:
        """Bytes, (), on the experts' device."""
        device = self._experts.up_proj.device
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return torch.tensor(torch.cuda.mem_get_info(device)[0] + unused, device=device)
        if sys.platform != "linux":
            return torch.tensor(sys.maxsize)  # no way to ask that all systems share
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return torch.tensor(int(found["MemAvailable"].split()[0]) * 1024)
