"""A small wrapped ViT, and parts to break it with."""

import torch

import adaptok
from adaptok.dc.host import HostDechunker
from adaptok.testing import make_vit

IMAGE = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(5))


def make_wrapped(**options):
    return adaptok.wrap(make_vit(), **({"chunker": "dc", "budget": 0.5} | options))


def state_of(model):
    """All that must be as it was: modules, attributes, hooks, weights."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: len(module._forward_pre_hooks) + len(module._forward_hooks)
            for name, module in model.named_modules()
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "keys": list(model.state_dict()),
        "ids": {name: id(module) for name, module in model.named_modules()},
    }


class UnevenRouter(adaptok.Router):
    """Keeps of each image a share that depends on the image."""

    def forward(self, tokens, context):
        norm = tokens.x.norm(dim=-1)
        share = (tokens.x.mean((1, 2)) * 1e4).frac()[:, None]
        place = norm.argsort(1).argsort(1) / norm.shape[1]
        return adaptok.Routing((0.5 * share - place + 0.5).clamp(0, 1))


class ShiftingDechunker(HostDechunker):
    def forward(self, chunks, plan, before):
        after = super().forward(chunks, plan, before)
        return after.with_x(after.x + 1e-3)
