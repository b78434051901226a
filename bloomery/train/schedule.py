"""Learning rates as pure functions of the optimizer step."""

import math


def learning_rate(
    step: int, max_steps: int, peak: float, schedule: str, warmup_steps: int = 0, decay_fraction: float = 0.2,
    min_ratio: float = 0.0,
) -> float:  # fmt: skip
    """The rate for optimizer step `step`, counted from 1.

    It rises linearly to `peak` at step `warmup_steps`, and at `max_steps` it is `peak * min_ratio` (`constant` stays).
    decay_fraction: share of all steps, at the end, over which `wsd` decays.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * (min_ratio + (1 - min_ratio) * _share(step, max_steps, schedule, warmup_steps, decay_fraction))


def _share(step: int, max_steps: int, schedule: str, warmup_steps: int, decay_fraction: float) -> float:
    """What is left of the way from the peak (1) to the end (0)."""
    if schedule == "cosine":  # Loshchilov and Hutter 2017, arXiv 1608.03983
        return (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps))) / 2
    if schedule == "wsd":  # warm-up, stable, decay by 1 − √x: Hägele et al. 2024, arXiv 2405.18392
        decay_steps = decay_fraction * max_steps
        decayed = step - (max_steps - decay_steps)
        return 1 - math.sqrt(decayed / decay_steps) if decayed > 0 else 1.0
    assert schedule == "constant", schedule
    return 1.0
