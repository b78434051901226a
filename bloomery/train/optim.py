"""AdamW (arXiv 1711.05101) with weight decay only where it belongs."""

from torch import nn
from torch.optim import AdamW, Optimizer

from bloomery.train.loop import LoopConfig

NO_DECAY = ("bias", "A_log", "D", "dt_bias")


def adamw(model: nn.Module, config: LoopConfig) -> Optimizer:
    """Fused AdamW over the trainable parameters, in two groups: with weight decay and without.

    Parameters sharded over other ranks than the rest are groups of their own, for one kernel takes one mesh.
    """
    decayed, plain = decay_groups(model, config.decay_embeddings)
    groups = [
        {"params": together, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0))
        for together in _by_mesh(parameters)
    ]
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    found: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)  # a DTensor has one
    return list(found.values())


def decay_groups(model: nn.Module, decay_embeddings: bool = True) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decayed, not decayed) trainable parameters, each once.

    Never decayed: norms, biases and all other vectors, and Mamba's A_log, D and dt_bias, whose time scales it would
    move (arXiv 2504.03624). Embeddings on request, and with them an output head tied to them.
    """
    embeddings = (
        {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} if not decay_embeddings else set()
    )
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or name.rpartition(".")[2] in NO_DECAY or id(parameter) in embeddings
            (plain if spared else decayed).append(parameter)
    return decayed, plain
