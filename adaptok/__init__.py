"""adaptok: adaptive tokenizers for any Vision Transformer or Diffusion Transformer.

The reference model spends its tokens where the image needs them:

>>> import torch, adaptok
>>> model = adaptok.DCDiT(adaptok.DCDiTConfig(hidden_size=64, depth=2, num_heads=4, latent_size=8))
>>> x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([3])
>>> out, routing = model(x, t, y, keep=0.25, return_routing=True)
>>> routing.kept
tensor([16])
"""

from importlib import import_module
from typing import TYPE_CHECKING

from adaptok.errors import AdaptokError

if TYPE_CHECKING:
    from adaptok import losses
    from adaptok.budgets import Budget, budget, set_budget
    from adaptok.chunking import Chunker, ChunkPlan, Dechunker, Provenance
    from adaptok.dc import DCDiT, DCDiTConfig
    from adaptok.discovery import (
        available,
        describe,
        register_chunker,
        register_dechunker,
        register_router,
    )
    from adaptok.hookspecs import hookimpl
    from adaptok.routing import Context, Router, Routing
    from adaptok.tokens import Tokens

__version__ = "0.1.0"

__all__ = [
    "AdaptokError",
    "Budget",
    "ChunkPlan",
    "Chunker",
    "Context",
    "DCDiT",
    "DCDiTConfig",
    "Dechunker",
    "Provenance",
    "Router",
    "Routing",
    "Tokens",
    "available",
    "budget",
    "describe",
    "hookimpl",
    "losses",
    "register_chunker",
    "register_dechunker",
    "register_router",
    "set_budget",
]

# Everything comes when it is asked for: the core imports no method, and `adaptok --help` no torch.
HOMES = {
    "Budget": "budgets",
    "ChunkPlan": "chunking",
    "Chunker": "chunking",
    "Context": "routing",
    "DCDiT": "dc",
    "DCDiTConfig": "dc",
    "Dechunker": "chunking",
    "Provenance": "chunking",
    "Router": "routing",
    "Routing": "routing",
    "Tokens": "tokens",
    "available": "discovery",
    "budget": "budgets",
    "describe": "discovery",
    "hookimpl": "hookspecs",
    "register_chunker": "discovery",
    "register_dechunker": "discovery",
    "register_router": "discovery",
    "set_budget": "budgets",
}
SUBMODULES = {
    "attention",
    "budgets",
    "chunking",
    "config",
    "dc",
    "diffusion",
    "losses",
    "measure",
    "routing",
    "see",
    "storage",
    "tokens",
    "train",
    "zoo",
}


def __getattr__(name: str) -> object:
    if name in SUBMODULES:
        return import_module(f"adaptok.{name}")
    if name not in HOMES:
        raise AttributeError(f"module 'adaptok' has no attribute {name!r}")
    value = getattr(import_module(f"adaptok.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
