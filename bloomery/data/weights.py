"""Rules that turn what is known of each source into its share of a phase: unique tokens, quality, epochs allowed."""

from collections.abc import Callable, Mapping

import numpy as np

from bloomery.errors import ConfigError

HALF_LIFE = 15.0
"""R* of Muennighoff et al. 2023 (arXiv 2305.16264): epochs after which a repeated token has lost most of its worth."""


def natural(tokens: Mapping[str, float]) -> dict[str, float]:
    """Shares in proportion to the unique tokens of each source."""
    return temperature(tokens, 1.0)


def temperature(tokens: Mapping[str, float], alpha: float) -> dict[str, float]:
    """Shares in proportion to tokens^alpha: 1 is natural, 0 gives all sources the same."""
    return _shares({name: count**alpha if count else 0.0 for name, count in tokens.items()})


def unimax(tokens: Mapping[str, float], budget: float, max_epochs: Mapping[str, float]) -> dict[str, float]:
    """The same tokens of every source, but none more often than its epochs allow; the rest is shared by the others.

    UniMax (Chung et al. 2023, arXiv 2304.09151). budget: tokens of the phase.
    """
    return water_filling(tokens, budget, {}, max_epochs, alpha=0.0, beta=0.0)


def water_filling(
    tokens: Mapping[str, float],
    budget: float,
    quality: Mapping[str, float],
    max_epochs: Mapping[str, float],
    alpha: float = 0.5,
    beta: float = 1.0,
    floors: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Quality × epochs: source i gets c · tokens^alpha · exp(beta · quality), between its floor and its cap.

    budget: tokens of the phase; c is what makes them add up to it. quality: 0 where not given; max_epochs: no cap where
    not given; floors: least share of the budget. Returns shares that sum to 1 (arXiv 2412.15285: weights from quality
    and epochs). Raises `ConfigError` when all caps together are less than the budget, or a floor is above its cap.
    """
    names = [name for name, count in tokens.items() if count > 0]
    unique = np.array([tokens[name] for name in names], dtype=float)
    least = np.array([(floors or {}).get(name, 0.0) * budget for name in names])
    most = unique * np.array([max_epochs.get(name, np.inf) for name in names])
    _refuse_impossible(names, least, most, budget)
    log_pull = alpha * np.log(unique) + beta * np.array([quality.get(name, 0.0) for name in names])
    pull = np.exp(log_pull - log_pull.max(initial=0.0))
    factor = _solve(lambda c: float(np.clip(c * pull, least, most).sum()), budget)
    given = dict(zip(names, np.clip(factor * pull, least, most).tolist(), strict=True))
    return _shares({name: given.get(name, 0.0) for name in tokens})


def effective_tokens(unique: float, epochs: float, half_life: float = HALF_LIFE) -> float:
    """What tokens that were read `epochs` times are worth in tokens read once.

    unique · (1 + R(1 − exp(−(epochs − 1)/R))) beyond the first epoch; Muennighoff et al. 2023 (arXiv 2305.16264).
    """
    if epochs <= 1:
        return unique * epochs
    return unique * float(1 + half_life * -np.expm1(-(epochs - 1) / half_life))


def _shares(amounts: Mapping[str, float]) -> dict[str, float]:
    total = sum(amounts.values())
    if not total > 0:
        raise ConfigError("blend: no source has a token; a rule for weights needs the unique tokens of each source")
    return {name: amount / total for name, amount in amounts.items()}


def _solve(amount: Callable[[float], float], budget: float) -> float:
    """The factor at which a growing function reaches the budget, by bisection to the last bit."""
    low, high = 0.0, 1.0
    while amount(high) < budget:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if amount(middle) < budget else (low, middle)
    return high


def _refuse_impossible(names: list[str], least: np.ndarray, most: np.ndarray, budget: float) -> None:
    for name, floor, cap in zip(names, least.tolist(), most.tolist(), strict=True):
        if floor > cap:
            raise ConfigError(
                f"source {name}: its floor asks for {floor:,.0f} tokens, its epochs allow {cap:,.0f}; lower the floor, "
                "raise max_epochs or add data"
            )
    if most.sum() < budget * (1 - 1e-12):
        raise ConfigError(
            f"the phase asks for {budget:,.0f} tokens, all sources under their max_epochs hold {most.sum():,.0f}; "
            "shorten it, raise max_epochs or add data"
        )
    if least.sum() > budget * (1 + 1e-12):
        raise ConfigError(f"floors: they add up to {least.sum() / budget:.3g} of the phase; lower them to at most 1")
