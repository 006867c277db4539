"""The routers without weights enter through the same door as everybody else's."""

from typing import TYPE_CHECKING

from adaptok.hookspecs import hookimpl

if TYPE_CHECKING:
    from adaptok.registry import Registry


@hookimpl
def adaptok_register(registry: "Registry") -> None:
    """Register routers that need no weights."""
    registry.router("predictability", "adaptok.routers.predictability:PredictabilityRouter")
    registry.router("covering", "adaptok.routers.covering:CoveringRouter")
    registry.router("cosine", "adaptok.routers.cosine:CosineRouter")
    registry.router("entropy", "adaptok.routers.entropy:EntropyRouter")
    registry.router("norm", "adaptok.routers.norm:NormRouter")
    registry.router("random", "adaptok.routers.chance:RandomRouter")
