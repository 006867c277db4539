"""A wrapped model with weights of its own, and what must not change when a load fails."""

import torch

import adaptok
from adaptok.testing import make_vit

IMAGE = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(5))


def make_trained(**options):
    """A wrapped model whose own weights are not those of a fresh wrap."""
    torch.manual_seed(1)  # of the fresh router
    vit = adaptok.wrap(make_vit(), **({"chunker": "dc", "budget": 0.4} | options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if ".adaptok." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return vit


def state_of(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "hooks": sum(len(module._forward_pre_hooks) for module in model.modules()),
        "wrapped": adaptok.is_wrapped(model),
    }


def is_same(one, other):
    weights = one.pop("weights"), other.pop("weights")
    equal = all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    return equal and weights[0].keys() == weights[1].keys() and one == other
