"""Step caches for diffusion: TeaCache, first-block cache, TaylorSeer."""
