"""What every layer of one forward call shares: documents, positions, masks. Built once a call, not once a layer."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bloomery.model.state import DecodeState


@dataclass
class Context:
    """One call on (batch, seq) tokens.

    `starts` (batch,) are the tokens each row already holds in its state, `held` the largest and `aligned` whether all
    are equal; without a state they are absent, 0 and true. `lengths` (batch,) are the valid tokens of each row of a
    right-padded input. `rope` is (cos, sin) for the positions of this call.
    """

    batch: int
    seq: int
    device: torch.device
    segment_ids: Tensor | None = None
    lengths: Tensor | None = None
    sliding_window: int | None = None
    starts: Tensor | None = None
    held: int = 0
    aligned: bool = True
    rope: tuple[Tensor, Tensor] | None = None

    @classmethod
    def build(
        cls,
        input_ids: Tensor,
        segment_ids: Tensor | None,
        state: DecodeState | None,
        lengths: Tensor | None,
        sliding_window: int | None,
    ) -> "Context":
        """Reads the state's lengths once (one synchronisation on an accelerator)."""
        batch, seq = input_ids.shape
        context = cls(batch, seq, input_ids.device, segment_ids, lengths, sliding_window)
        if state is not None:
            low, high = state.lengths.aminmax()
            context.starts, context.held = state.lengths, int(high)
            context.aligned = int(low) == context.held
        return context

    @classmethod
    def static(cls, state: DecodeState, sliding_window: int | None) -> "Context":
        """Of one token a row, with the shapes of any call on this state: keys are all there is room for, and what a
        row sees of them is left to the mask. No value is read. A full row writes over its last token."""
        last, device = state.max_tokens - 1, state.lengths.device
        starts = state.lengths.clamp(max=last)
        return cls(state.batch, 1, device, None, None, sliding_window, starts, held=last, aligned=False)

    @property
    def total(self) -> int:
        """Keys an attention layer looks at: the longest row's held tokens plus the new ones."""
        return self.held + self.seq

    @cached_property
    def positions(self) -> Tensor:
        """Position of each new token in its row, (batch or 1, seq)."""
        new = torch.arange(self.seq, device=self.device)
        if self.aligned:
            return (new + self.held)[None]
        assert self.starts is not None
        return self.starts[:, None] + new

    @cached_property
    def whole_rope(self) -> tuple[Tensor, Tensor]:
        """`rope` of a call on one token, as `rope.rotate_few` wants it: (batch or 1, 1, head_dim)."""
        assert self.rope is not None
        cos, sin = (table[:, 0] for table in self.rope)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    @property
    def causal(self) -> bool:
        """True when a plain causal mask over the new tokens is all that is needed."""
        return self.held == 0 and self.segment_ids is None and self._unlimited

    @property
    def _unlimited(self) -> bool:
        return self.sliding_window is None or self.sliding_window >= self.total

    @cached_property
    def mask(self) -> Tensor | None:
        """Which keys a query sees: (batch or 1, 1, seq, total) bool, or `None` for all of them or for `causal`."""
        if self.causal or (self.seq == 1 and self.aligned and self._unlimited):
            return None
        keys = torch.arange(self.total, device=self.device)
        queries = self.positions[:, :, None]
        seen = keys <= queries
        if self.sliding_window is not None and not self._unlimited:
            seen = seen & (keys > queries - self.sliding_window)
        if self.segment_ids is not None:
            seen = seen & (self.segment_ids[:, :, None] == self.segment_ids[:, None, :])
        return seen[:, None]

    @cached_property
    def valid(self) -> Tensor | None:
        """(batch, seq) bool: false on right padding; `None` when there is none."""
        if self.lengths is None:
            return None
        return torch.arange(self.seq, device=self.device) < self.lengths[:, None]

    def last(self, x: Tensor) -> Tensor:
        """Each row's last valid token of x (batch, seq, …): (batch, 1, …)."""
        if self.lengths is None:
            return x[:, -1:]
        return x[torch.arange(self.batch, device=self.device), self.lengths - 1].unsqueeze(1)
