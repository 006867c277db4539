"""Step caches for diffusion: TeaCache, first-block cache, TaylorSeer.

>>> import adaptok
>>> from adaptok_cache import TeaCache
>>> adaptok.describe("teacache").entries[0].load() is TeaCache
True
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptok_cache.firstblock import FirstBlockCache
    from adaptok_cache.idling import IdleCacheWarning
    from adaptok_cache.stage import StepCache
    from adaptok_cache.taylorseer import TaylorSeer
    from adaptok_cache.teacache import TeaCache

__all__ = ["FirstBlockCache", "IdleCacheWarning", "StepCache", "TaylorSeer", "TeaCache"]

# Everything comes when it is asked for, so that announcing the stages imports nothing heavy.
HOMES = {
    "FirstBlockCache": "firstblock",
    "IdleCacheWarning": "idling",
    "StepCache": "stage",
    "TaylorSeer": "taylorseer",
    "TeaCache": "teacache",
}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'adaptok_cache' has no attribute {name!r}")
    return getattr(import_module(f"adaptok_cache.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
