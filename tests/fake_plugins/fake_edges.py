"""A plug-in as it should be: it imports nothing heavy until a name is used."""

import adaptok


@adaptok.hookimpl
def adaptok_register(registry):
    registry.router("edges", "fake_edges_router:EdgeRouter")
    registry.router("needs-more", "fake_needs_more:Router", install="pip install more")
    registry.router("not-there", "fake_edges_router:Missing")
