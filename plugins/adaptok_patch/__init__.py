"""Patches whose size follows the entropy of the image.

>>> import torch, adaptok, adaptok_patch
>>> from adaptok.testing import make_vit
>>> vit = adaptok.wrap(make_vit(), chunker="apt")  # natural: the thresholds of the router
>>> images = torch.rand(2, 3, 32, 48)
>>> maps = adaptok_patch.measure_entropy(images, patch=8, peak=1.0)
>>> with adaptok_patch.entropy_maps(vit, maps), adaptok.trace(vit) as seen:
...     out = vit(images)
>>> patches = adaptok_patch.quadtree(maps, thresholds=(6.0, 4.0), grid=(4, 6))
>>> patches.counts.equal(seen.steps[0].plans[0].requested)
True
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptok_patch.given import entropy_maps
    from adaptok_patch.pictures import measure_entropy, patch_entropy
    from adaptok_patch.tree import Leaves, quadtree

__all__ = ["Leaves", "entropy_maps", "measure_entropy", "patch_entropy", "quadtree"]

# Everything comes when it is asked for, so that announcing the parts imports nothing heavy.
HOMES = {
    "Leaves": "tree",
    "entropy_maps": "given",
    "measure_entropy": "pictures",
    "patch_entropy": "pictures",
    "quadtree": "tree",
}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'adaptok_patch' has no attribute {name!r}")
    return getattr(import_module(f"adaptok_patch.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
