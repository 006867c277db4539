"""Registers a name that is taken."""

import adaptok


@adaptok.hookimpl
def adaptok_register(registry):
    registry.router("thief", "fake_edges_router:EdgeRouter")
    registry.router("dc", "fake_edges_router:EdgeRouter")
