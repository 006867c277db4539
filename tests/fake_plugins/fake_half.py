"""Fails after its first registration."""

import adaptok


@adaptok.hookimpl
def adaptok_register(registry):
    registry.router("half-done", "fake_edges_router:EdgeRouter")
    raise ValueError("no further")
