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

from adaptok import losses
from adaptok.budgets import Budget, budget, set_budget
from adaptok.chunking import Chunker, ChunkPlan, Dechunker, Provenance
from adaptok.errors import AdaptokError
from adaptok.routing import Context, Router, Routing
from adaptok.tokens import Tokens

if TYPE_CHECKING:
    from adaptok.dc import DCDiT, DCDiTConfig

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
    "budget",
    "losses",
    "set_budget",
]

# Methods come when they are asked for, so that the core imports none.
LAZY = {"DCDiT": "adaptok.dc", "DCDiTConfig": "adaptok.dc"}


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module 'adaptok' has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
