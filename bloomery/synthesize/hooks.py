"""Sketches of per-sample gradients from one forward and backward pass, without any gradient of a weight.

The gradient of a weight is a sum over tokens of (gradient of the output) ⊗ (input). Both pass by during the backward
pass, row by row of the batch, and are contracted with the sketch at once (the factors of "ghost" gradients,
arXiv 2110.05679). Weights are frozen meanwhile, so that the products which would make their gradients are saved.
Nothing may mix the samples of a batch: no packing, no dropout, no capacity of experts.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.data.pack import IGNORE, Batch
from bloomery.errors import ConfigError
from bloomery.model.decoder import Decoder
from bloomery.model.mamba import Mamba
from bloomery.model.moe import MoE, Router
from bloomery.model.norm import GatedRMSNorm, RMSNorm
from bloomery.synthesize.sketch import Projection, Sketcher

_LOGITS = 2**22  # elements of a chunk: 16 MiB


class GradientHooks:
    """`with GradientHooks(model, sketcher) as hooks: z, nll = hooks(batch)`."""

    def __init__(self, model: Decoder, sketcher: Sketcher):
        self.model, self.sketcher = model, sketcher
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._covered: set[str] = set()
        self._z = torch.empty(0)

    def __enter__(self) -> "GradientHooks":
        self._undo = ExitStack()
        for parameter in self.model.parameters():
            self._undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for module in self.model.modules():
            self._attach(module)
        self._covered.add(self._names[id(self.model.lm_head.weight)])
        missing = sorted(set(self._shapes) - self._covered)
        if missing:
            self._undo.close()
            raise ConfigError(f"proxy: no rule for the gradient of {', '.join(missing)}; use the path `loop`")
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sketches (batch, dim) of the gradients of each row's mean loss, and those losses (batch,) in nats.

        batch: `input_ids` and `labels` (batch, seq), rows padded at their right end.
        """
        ids, labels = batch["input_ids"], batch["labels"]
        weight = self.model.lm_head.weight
        self._z = torch.zeros(len(ids), self.sketcher.config.dim, dtype=_exact(weight), device=ids.device)
        with torch.enable_grad():
            hidden = self.model(ids)
            of_hidden, losses = self._head(hidden.detach(), labels)
            hidden.backward(of_hidden)
        return self._z, losses

    def _head(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the hidden states and the mean loss of each row; the head's own gradient is sketched."""
        places, kept = _labelled(labels)
        own = hidden.gather(1, places.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
        targets = labels.gather(1, places).clamp(min=0)
        shares = kept / kept.sum(1, keepdim=True)
        of_own, losses = torch.empty_like(own), torch.empty(len(labels), dtype=self._z.dtype, device=labels.device)
        step = max(1, _LOGITS // (places.shape[1] * self.model.config.vocab_size))
        for start in range(0, len(labels), step):
            at = slice(start, start + step)
            of_own[at], losses[at] = self._head_chunk(at, own[at], targets[at], shares[at])
        return torch.zeros_like(hidden).scatter_(1, places.unsqueeze(2).expand_as(own), of_own), losses

    def _head_chunk(self, at: slice, hidden: Tensor, targets: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.model.lm_head.weight
        logprobs = F.linear(hidden, weight).to(self._z.dtype).log_softmax(-1)
        column = targets.unsqueeze(2)
        losses = -(logprobs.gather(2, column).squeeze(2) * shares).sum(1)
        of_logits = logprobs.exp_()
        of_logits.scatter_add_(2, column, of_logits.new_full((1, 1, 1), -1.0).expand_as(column))
        of_logits *= shares.unsqueeze(2)
        self._of(weight).add_product(self._z[at], of_logits, hidden.to(of_logits))
        return of_logits.to(weight) @ weight, losses

    def _of(self, parameter: Tensor) -> Projection:
        name = self._names[id(parameter)]
        return self.sketcher.of(name, self._shapes[name])

    def _cover(self, *parameters: Tensor | None) -> None:
        self._covered |= {self._names[id(parameter)] for parameter in parameters if parameter is not None}

    def _attach(self, module: nn.Module) -> None:
        for kind, rule in _RULES:
            if isinstance(module, kind):
                rule(self, module)

    def _after(self, module: nn.Module, rule: Callable[[tuple[Any, ...], Any], object]) -> None:
        """`rule(inputs, output)` after each forward pass of the module."""

        def hook(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            rule(given, out)

        self._undo.callback(module.register_forward_hook(hook).remove)

    def _embedding(self, module: nn.Embedding) -> None:
        self._cover(module.weight)

        def after(given: tuple[Tensor], out: Tensor) -> None:
            out.requires_grad_()
            out.register_hook(lambda grad: self._of(module.weight).add_lookup(self._z, given[0], self._exact(grad)))

        self._after(module, after)

    def _linear(self, module: nn.Linear) -> None:
        if module is self.model.lm_head:
            return
        self._cover(module.weight, module.bias)
        backward = partial(self._of_linear, module)
        self._after(module, lambda given, out: out.register_hook(partial(backward, given[0].detach())))

    def _of_linear(self, module: nn.Linear, x: Tensor, grad: Tensor) -> None:
        grad = self._exact(grad)
        self._of(module.weight).add_product(self._z, grad, self._exact(x))
        if module.bias is not None:
            self._add(module.bias, grad.sum(1))

    def _norm(self, module: RMSNorm | GatedRMSNorm) -> None:
        self._cover(module.weight)
        bare = copy.deepcopy(module)  # linear in its weight, so with ones it gives what the weight multiplies
        nn.init.ones_(bare.weight)

        def backward(given: list[Tensor], grad: Tensor) -> None:
            with torch.no_grad():
                factor = bare(*given)
            self._add(module.weight, (self._exact(grad) * factor).flatten(1, -2).sum(1))

        self._after(module, lambda given, out: out.register_hook(partial(backward, [t.detach() for t in given])))

    def _mamba(self, module: Mamba) -> None:
        """What is no layer of its own: convolution, decay, skip and the bias of the time steps. The first three are
        given to each sample as a copy with a gradient; the last has the gradient of what it is added to."""
        self._cover(module.conv1d.weight, module.conv1d.bias, module.A_log, module.D, module.dt_bias)
        heads = module.config.mamba_num_heads
        self._undo.enter_context(_replaced(module, "convolve", partial(self._convolve, module)))
        self._undo.enter_context(_replaced(module, "scan", _ScanBySample(module.scan, self, module)))

        def after(given: tuple[Tensor], out: Tensor) -> None:
            out.register_hook(lambda grad: self._add(module.dt_bias, self._exact(grad[..., -heads:]).sum(1)))

        self._after(module.in_proj, after)

    def _convolve(self, module: Mamba, x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
        taps = self._copy(module.conv1d.weight, weight.unsqueeze(1), len(x))[:, :, 0]
        linear = x * taps[:, None, :, -1]
        for back in range(1, min(taps.shape[2], x.shape[1])):
            linear = linear + F.pad(x[:, :-back], (0, 0, back, 0)) * taps[:, None, :, -1 - back]
        if module.conv1d.bias is not None and bias is not None:
            linear = linear + self._copy(module.conv1d.bias, bias, len(x)).unsqueeze(1)
        return F.silu(linear)

    def _copy(self, parameter: Tensor, value: Tensor, batch: int) -> Tensor:
        """`value` for each sample, (batch, *shape), whose gradient is sketched as the parameter's."""
        copy = value.detach().expand(batch, *value.shape).clone().requires_grad_()
        copy.register_hook(lambda grad: self._add(parameter, self._exact(grad)))
        return copy

    def _router(self, module: Router) -> None:
        self._cover(module.weight)

        def after(given: tuple[Tensor], routing: Any) -> None:
            x = given[0].detach()

            def backward(grad: Tensor) -> None:
                rows = (self._exact(t).unflatten(0, (len(self._z), -1)) for t in (grad, x))
                self._of(module.weight).add_product(self._z, *rows)

            routing.logits.register_hook(backward)

        self._after(module, after)

    def _moe(self, module: MoE) -> None:
        """Rows reach the experts sorted by expert; whose they are follows from the order of the choices."""
        experts, samples = module.experts, torch.empty(0)
        self._cover(*experts.parameters())

        def before(_: nn.Module, given: tuple[Any, ...]) -> None:
            nonlocal samples
            order = given[1].flatten().argsort(stable=True)
            samples = order // (len(order) // len(self._z))

        def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
            out = inner(x, weight, ends)
            counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
            out.register_hook(partial(backward, weight, x.detach(), counts, samples))
            return out

        def backward(weight: Tensor, x: Tensor, counts: list[int], samples: Tensor, grad: Tensor) -> None:
            self._of(weight).add_stacked(self._z, self._exact(grad), self._exact(x), counts, samples)

        inner = experts.product
        handle = module.dispatch.register_forward_pre_hook(before)
        self._undo.callback(handle.remove)
        self._undo.enter_context(_replaced(experts, "product", product))

    def _add(self, parameter: Tensor, gradient: Tensor) -> None:
        """gradient (batch, *shape) of a small parameter."""
        projection = self._of(parameter)
        projection.add(self._z, gradient.reshape(len(gradient), projection.num_rows, projection.num_cols))

    def _exact(self, t: Tensor) -> Tensor:
        return t.to(self._z.dtype)


_RULES: tuple[tuple[Any, Callable[[GradientHooks, Any], None]], ...] = (
    (nn.Embedding, GradientHooks._embedding),
    (nn.Linear, GradientHooks._linear),
    (RMSNorm | GatedRMSNorm, GradientHooks._norm),
    (Mamba, GradientHooks._mamba),
    (Router, GradientHooks._router),
    (MoE, GradientHooks._moe),
)


class _ScanBySample(nn.Module):
    """A scan in which decay and skip have a gradient for each sample.

    With decay A·m and inputs dt·x the recurrence sees dt·m and x / m alike, and dL/dm at m = 1 is dL/dA_log.
    """

    def __init__(self, scan: nn.Module, hooks: GradientHooks, module: Mamba):
        super().__init__()
        self.scan, self._hooks, self._module = scan, hooks, [module]  # in a list: it is no part of this one

    def forward(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        [module] = self._module
        m = self._hooks._copy(module.A_log, torch.ones_like(A), len(x)).unsqueeze(1)
        skip = self._hooks._copy(module.D, D, len(x))
        x = x.to(m.dtype)
        y, state = self.scan(x / m.unsqueeze(3), dt * m, A, B, C, torch.zeros_like(D), *rest)
        return y + skip[:, None, :, None] * x, state


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The attribute has another value inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _labelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Places of each row's labels, (batch, most), padded with others, and which are labels indeed."""
    mask = labels != IGNORE
    places = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return places, mask.gather(1, places)


def _exact(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
