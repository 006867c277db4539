"""Implements a hook that does not exist."""

import adaptok


@adaptok.hookimpl
def adaptok_registr(registry):
    registry.router("misspelt", "fake_edges_router:EdgeRouter")
