"""Decoding on a GPU as CUDA graphs: a whole step is one launch, and nothing waits for the GPU.

A graph repeats kernels with the shapes and addresses they had when it was captured. So a captured step takes a static
form, whose shapes follow from the memory alone; there is a graph for each number of rows (1, 2, 4, 8, then multiples of
8) and each place and size that the memory has had. The memory grows twofold, so there are few.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bloomery.model.context import Context
from bloomery.model.decoder import Decoder
from bloomery.model.state import DecodeState
from bloomery.model.step import Step
from bloomery.progress import say

_MOST_GRAPHS = 64
_FINE = 8  # rows: fewer are rounded up to a power of two, more to a multiple


def prepared(model: Decoder, deterministic: bool = False) -> Step:
    """The fastest step of a model where it is now."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    return CapturedStep(model) if on_gpu and not deterministic else Step(model, deterministic)


@dataclass(eq=False)
class _Shape:
    """What has been decoded in one shape and place. `kept`: what a graph reads must not be freed while it lives."""

    tokens: Tensor
    moves: Tensor
    kept: list[Tensor]
    rows: int = 0  # live ones
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None


class CapturedStep(Step):
    """As `Step`. The first call of a shape is an ordinary one, the second is captured, later ones are replayed.

    Logits are valid until the next call. Where a layer is called as it is, or a library refuses to be captured, it says
    so once and decodes as `Step` does.
    """

    def __init__(self, model: Decoder):
        super().__init__(model)
        device = next(model.parameters()).device
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._refuse(self.obstacle)

    def _refuse(self, reason: str | None) -> None:
        self._refused = reason is not None
        if reason:
            _say_once(f"decoding is not captured as CUDA graphs, which is slower: {reason}")

    def __call__(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """tokens (batch, 1) int64 → (batch, vocab); `state` moves on by one token."""
        if self._refused:
            return super().__call__(tokens, state)
        wide = widened(state)
        with torch.inference_mode(False), torch.no_grad():  # what is kept outlives the caller's mode
            shape = self._shape(wide)
            _set_rows(shape, tokens)
            if shape.logits is None:
                shape.logits = self._warm_up(shape, wide)
            else:
                if shape.graph is None:
                    self._capture(shape, wide)
                if shape.graph is None:
                    return super().__call__(tokens, state)
                shape.graph.replay()
            return shape.logits[: len(tokens)]

    @torch.no_grad()
    def static(self, tokens: Tensor, state: DecodeState, moves: Tensor) -> Tensor:
        """A step without a look at any value, in shapes that depend on `state.batch` and `max_tokens` only.

        moves: (batch,) int64, 1 for live rows; where it is 0, the length stays and the logits mean nothing.
        """
        logits = self._run(tokens, state, Context.static(state, self._model.config.sliding_window))
        state.lengths.add_(moves)
        return logits

    def _shape(self, wide: DecodeState) -> _Shape:
        key = wide.batch, wide.max_tokens, *(buffer.data_ptr() for buffer in (wide.lengths, *wide.buffers))
        shape = self._shapes.pop(key, None) or self._new(wide)
        self._shapes[key] = shape  # the last one used goes last
        if len(self._shapes) > _MOST_GRAPHS:
            del self._shapes[next(iter(self._shapes))]
        return shape

    def _new(self, wide: DecodeState) -> _Shape:
        model = self._model
        kept = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        if model.rope is not None:
            kept.append(model.rope.table(wide.max_tokens, wide.lengths.device))
        moves = torch.zeros_like(wide.lengths)
        return _Shape(moves.unsqueeze(1).clone(), moves, kept)

    def _warm_up(self, shape: _Shape, wide: DecodeState) -> Tensor:
        """On the stream of the capture, so that libraries are ready for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            logits = self.static(shape.tokens, wide, shape.moves)
        torch.cuda.current_stream().wait_stream(self._stream)
        return logits

    def _capture(self, shape: _Shape, wide: DecodeState) -> None:
        """Computes nothing yet."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                logits = self.static(shape.tokens, wide, shape.moves)
        except RuntimeError as error:
            self._refuse(str(error))
        else:
            shape.graph, shape.logits = graph, logits


def _set_rows(shape: _Shape, tokens: Tensor) -> None:
    rows = len(tokens)
    shape.tokens[:rows] = tokens
    if shape.rows != rows:
        shape.moves.zero_()
        shape.moves[:rows] = 1
        shape.rows = rows


def widened(state: DecodeState) -> DecodeState:
    """`state` and so many of the rows behind it that their number has a graph, or as many as there are."""
    if state.whole is None:
        return state
    assert state.whole.lengths.data_ptr() == state.lengths.data_ptr(), "resized after its head was taken"
    rows = state.batch
    bucket = 1 << (rows - 1).bit_length() if rows <= _FINE else -(-rows // _FINE) * _FINE
    return state.whole.head(min(bucket, state.whole.batch))


@cache
def _say_once(text: str) -> None:
    say(text)
