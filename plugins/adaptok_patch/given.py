"""Entropies of the picture itself, given to the router of a wrapped model for some calls."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from adaptok.errors import ConfigError, NotWrappedError
from adaptok_patch.router import AptRouter
from adaptok_patch.scales import check_scales, check_thresholds

THRESHOLDS = (6.0, 4.0)  # bits, for scales 2 and 4: the setting of the paper


@dataclass(frozen=True, slots=True, eq=False)
class GivenEntropy:
    """Entropies of a batch of pictures, with the thresholds that belong to them.

    Args:
        maps: by scale, in bits.
        thresholds: in bits, one a scale.
    """

    maps: Mapping[int, Float[Tensor, "b _h _w"]]
    thresholds: tuple[float, ...]


@contextmanager
def entropy_maps(
    model: nn.Module,
    maps: Mapping[int, Float[Tensor, "b _h _w"]],
    thresholds: Sequence[float] = THRESHOLDS,
) -> Iterator[nn.Module]:
    """Let a wrapped model choose its patches by the pixels, in the calls inside a `with` block.

    Inside the blocks of a host only tokens are seen. The maps are a setting like a budget per
    sample: they belong to the caller, and are taken away at the end of the block.

    Args:
        model: a model that is wrapped with the router `"apt"`, compiled or not.
        maps: by scale, entropies in bits of one batch, on the device of the model; see
            `measure_entropy`. A call with both halves of a guided batch needs them for both.
        thresholds: in bits, one a scale, from fine to coarse.

    Yields:
        The model.

    Raises:
        NotWrappedError: the model has no router `"apt"`.
        ConfigError: the scales are not those of the router, or there is not one threshold each.

    Example:
        >>> import torch, adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="apt")
        >>> flat = {2: torch.zeros(1, 2, 3), 4: torch.zeros(1, 1, 2)}
        >>> with entropy_maps(vit, flat), adaptok.trace(vit) as seen:
        ...     out = vit(torch.randn(1, 3, 32, 48))
        >>> seen.steps[0].plans[0].requested  # a block of 4 by 4 cells, and two of 2 by 2
        tensor([3])
    """
    routers = [module for module in model.modules() if isinstance(module, AptRouter)]
    if not routers:
        raise NotWrappedError(
            f'{type(model).__name__} has no router "apt" that takes entropies: call '
            'adaptok.wrap(model, chunker="apt") first, or wrap with router="apt"'
        )
    scales = check_scales((1, *sorted(maps)))
    given = GivenEntropy(dict(maps), check_thresholds(thresholds, scales))
    for router in routers:
        if router.scales != scales:
            raise ConfigError(
                f"the maps are of the scales {scales[1:]}, and the router has {router.scales[1:]}: "
                "give one map for each of those"
            )
    before = [router.given for router in routers]
    try:
        for router in routers:
            router.given = given
        yield model
    finally:
        for router, setting in zip(routers, before, strict=True):
            router.given = setting
