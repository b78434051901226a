"""What a decoder remembers between calls: keys and values, convolution columns, Mamba-2 states. Written in place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from bloomery.model.config import ModelConfig


@dataclass
class KeyValueCache:
    """Of one attention layer: keys (batch, key_value_heads, head_dim, max_tokens), so that a query's products with all
    of them run along memory, and values (batch, key_value_heads, max_tokens, head_dim)."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls, config: ModelConfig, batch: int, max_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> Self:
        values = torch.zeros(batch, config.num_key_value_heads, max_tokens, config.head_dim, device=device, dtype=dtype)
        return cls(torch.zeros_like(values.mT, memory_format=torch.contiguous_format), values)

    def resize(self, batch: int, max_tokens: int) -> None:
        """See `DecodeState.resize`."""
        _, heads, _, head_dim = self.values.shape
        self.keys = _fitted(self.keys, (batch, heads, head_dim, max_tokens))
        self.values = _fitted(self.values, (batch, heads, max_tokens, head_dim))

    def span(self, row: int, start: int, stop: int) -> list[Tensor]:
        """Views of a row's keys (key_value_heads, head_dim, n) and values (key_value_heads, n, head_dim)."""
        return [self.keys[row, :, :, start:stop], self.values[row, :, start:stop]]


@dataclass
class MambaCache:
    """Of one Mamba-2 layer: the last raw convolution inputs (batch, conv_kernel − 1, conv channels) in the model's
    dtype, and the state (batch, groups, state, channels of a group) in float32: a 16-bit state drifts over long
    generations."""

    conv: Tensor
    ssm: Tensor

    @classmethod
    def allocate(
        cls, config: ModelConfig, batch: int, max_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> Self:
        ssm = batch, config.n_groups, config.ssm_state_size, config.mamba_inner_size // config.n_groups
        conv = batch, config.conv_kernel - 1, config.mamba_conv_size
        return cls(torch.zeros(conv, device=device, dtype=dtype), torch.zeros(ssm, device=device, dtype=torch.float32))

    def resize(self, batch: int, max_tokens: int) -> None:
        """See `DecodeState.resize`; the size of a row does not depend on its tokens."""
        self.conv = _fitted(self.conv, (batch, *self.conv.shape[1:]))
        self.ssm = _fitted(self.ssm, (batch, *self.ssm.shape[1:]))


Cache = KeyValueCache | MambaCache | None
CACHES: dict[str, type[KeyValueCache] | type[MambaCache]] = {"*": KeyValueCache, "M": MambaCache}


@dataclass
class DecodeState:
    """Memory for `batch` sequences, each at its own length and of at most `max_tokens`; `resize` changes both.

    `lengths` (batch,) int64 counts the tokens held by each row. A row whose length is 0 is free: what its buffers
    hold is ignored by attention; `clear` (or `put`) makes them usable again for the Mamba-2 layers. `whole` is the
    state of which this one is the head.
    """

    layers: list[Cache]
    lengths: Tensor
    max_tokens: int
    whole: "DecodeState | None" = None

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Zeroed buffers; their bytes are `config.cache_bytes(batch, max_tokens, dtype)`."""
        place = torch.device(device or "cpu"), dtype or torch.get_default_dtype()
        layers = [
            CACHES[kind].allocate(config, batch, max_tokens, *place) if kind in CACHES else None
            for kind in config.pattern
        ]
        return cls(layers, torch.zeros(batch, dtype=torch.int64, device=place[0]), max_tokens)

    @property
    def batch(self) -> int:
        """Rows, free ones included."""
        return len(self.lengths)

    @property
    def buffers(self) -> list[Tensor]:
        """All that the layers keep."""
        return [getattr(cache, field.name) for cache in self.layers if cache for field in fields(cache)]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers: `config.cache_bytes(batch, max_tokens, dtype)`."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def resize(self, rows: int, max_tokens: int) -> None:
        """Room for `rows` sequences of `max_tokens`. Rows beyond are dropped, new ones are free.

        The buffers are new tensors afterwards, made one layer after the other, so that little is held twice.
        """
        held = int(self.lengths[:rows].max()) if rows and self.batch else 0
        if held > max_tokens:
            raise ValueError(f"resize: a row holds {held} tokens, {max_tokens} do not hold it; keep at least {held}")
        for cache in self.layers:
            if cache is not None:
                cache.resize(rows, max_tokens)
        self.lengths, self.max_tokens = _fitted(self.lengths, (rows,)), max_tokens

    def head(self, rows: int) -> "DecodeState":
        """The first `rows` rows, sharing memory: decode fewer sequences without copying."""
        return DecodeState(
            [_map(c, lambda buffer: buffer[:rows]) for c in self.layers], self.lengths[:rows], self.max_tokens, self
        )

    def only(self, row: int) -> "DecodeState":
        """Row `row` alone, sharing memory."""
        return DecodeState(
            [_map(c, lambda buffer: buffer[row : row + 1]) for c in self.layers],
            self.lengths[row : row + 1],
            self.max_tokens,
        )

    def take(self, rows: Tensor) -> "DecodeState":
        """A copy of these rows (n,), with room for `max_tokens` as before."""
        return DecodeState(
            [_map(c, lambda buffer: buffer[rows]) for c in self.layers], self.lengths[rows], self.max_tokens
        )

    def put(self, slots: Tensor, other: "DecodeState") -> None:
        """Copies all rows of `other` into rows `slots` (n,) of this state."""
        if len(slots) != other.batch:
            raise ValueError(f"put: {len(slots)} slots for {other.batch} rows; give one slot per row")
        held = int(other.lengths.max()) if other.batch else 0
        if held > self.max_tokens:
            raise ValueError(f"put: a row holds {held} tokens, this state has room for {self.max_tokens}")
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(mine, KeyValueCache) and isinstance(theirs, KeyValueCache):
                mine.keys[slots, :, :, :held] = theirs.keys[..., :held]
                mine.values[slots, :, :held] = theirs.values[:, :, :held]
            elif isinstance(mine, MambaCache) and isinstance(theirs, MambaCache):
                mine.conv[slots] = theirs.conv
                mine.ssm[slots] = theirs.ssm
        self.lengths[slots] = other.lengths

    def span(self, row: int, start: int, stop: int) -> list[Tensor]:
        """Views of what row `row` holds for tokens start … stop − 1: keys and values of each attention layer."""
        caches = [cache for cache in self.layers if isinstance(cache, KeyValueCache)]
        return [view for cache in caches for view in cache.span(row, start, stop)]

    def memory(self, row: int) -> list[Tensor]:
        """Views of what row `row` remembers as a whole: convolution columns and state of each Mamba-2 layer."""
        caches = [cache for cache in self.layers if isinstance(cache, MambaCache)]
        return [view for cache in caches for view in (cache.conv[row], cache.ssm[row])]

    def clear(self, slots: Tensor) -> None:
        """Frees rows `slots` (n,): length 0 and empty Mamba-2 memory, ready for a new prompt."""
        self.lengths[slots] = 0
        for cache in self.layers:
            if isinstance(cache, MambaCache):
                cache.conv[slots] = 0
                cache.ssm[slots] = 0


def _fitted(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """A buffer of this shape: what both have in common is copied, the rest is zero."""
    fitted = buffer.new_zeros(shape)
    common = tuple(slice(min(old, new)) for old, new in zip(buffer.shape, shape, strict=True))
    fitted[common] = buffer[common]
    return fitted


def _map(cache: Cache, function: Callable[[Tensor], Tensor]) -> Cache:
    if cache is None:
        return None
    return type(cache)(*(function(getattr(cache, field.name)) for field in fields(cache)))
