"""Step caches for diffusion: TeaCache, first-block cache, TaylorSeer."""

from adaptok_cache.firstblock import FirstBlockCache
from adaptok_cache.stage import IdleCacheWarning, StepCache
from adaptok_cache.taylorseer import TaylorSeer
from adaptok_cache.teacache import TeaCache

__all__ = ["FirstBlockCache", "IdleCacheWarning", "StepCache", "TaylorSeer", "TeaCache"]
