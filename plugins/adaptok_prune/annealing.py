"""Keep rates that fall while a model learns to do with fewer tokens."""

import math

from adaptok.errors import ConfigError


def anneal_keep_rate(step: int, start: int, end: int, final: float) -> float:
    """Return EViT's keep rate at a training step: from 1 down to the final one, along a cosine.

    Args:
        step: number of the training step.
        start: the step up to which every token stays.
        end: the step from which on the rate is the final one.
        final: the keep rate in the end, in (0, 1].

    Returns:
        The keep rate, for `stage.keep_rate`.

    Raises:
        ConfigError: the end is not behind the start, or the final rate is out of range.

    Example:
        >>> [round(anneal_keep_rate(step, 10, 20, 0.7), 3) for step in (0, 10, 15, 20, 30)]
        [1.0, 1.0, 0.85, 0.7, 0.7]

    Paper: Liang et al., Not All Patches are What You Need, 2022.
    """
    if not start < end:
        raise ConfigError(f"annealing ends behind its start, got start={start} and end={end}")
    if not 0.0 < final <= 1.0:
        raise ConfigError(f"the final keep rate is a share in (0, 1], got {final:g}")
    done = min(1.0, max(0.0, (step - start) / (end - start)))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
