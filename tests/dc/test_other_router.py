"""The reference model with a router that is not its own."""

import pytest
import torch
from torch import nn

import adaptok
from adaptok.dc.folder import ModelCard, load_model, save_model
from adaptok.dc.router import DCRouter
from adaptok.errors import AdaptokError, BudgetError, ConfigError, UnknownNameError
from adaptok.losses import ratio_loss

SIZES = {"hidden_size": 64, "depth": 1, "num_heads": 2, "latent_size": 8, "num_classes": 3}


def make_inputs(b=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(b, 4, 6, 8, generator=generator), torch.tensor([9.0, 700.0]), torch.arange(b)


def test_the_plug_in_router_of_the_ablation_decides_and_learns():
    torch.manual_seed(0)
    model = adaptok.DCDiT(adaptok.DCDiTConfig(**SIZES, router={"name": "hnet", "scan": "snake"}))
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    out, routing = model(*make_inputs(), return_routing=True)
    expected = model.router(model.route(*make_inputs())[1], adaptok.Context())
    assert torch.equal(routing.keep_prob, expected.keep_prob)
    assert 0 < routing.keep_mask.sum() < routing.keep_mask.numel()
    (out.square().mean() + ratio_loss(routing, target=4.0, group_size=2)).backward()
    assert model.router.query.weight.grad.abs().sum() > 0
    kept = model(*make_inputs(), keep=0.25, return_routing=True)[1]
    assert kept.keep_mask.sum(1).tolist() == [12, 12]


def test_none_is_its_own_and_keeps_its_weights_and_names():
    model = adaptok.DCDiT(adaptok.DCDiTConfig(**SIZES))
    assert type(model.router) is DCRouter
    other = adaptok.DCDiT(adaptok.DCDiTConfig(**SIZES, router="cosine"))
    own = {name for name in model.state_dict() if not name.startswith("router.")}
    assert set(other.state_dict()) == own


def test_a_folder_remembers_the_router(tmp_path):
    config = adaptok.DCDiTConfig(**SIZES, router={"name": "cosine", "falloff": 1.0})
    model = adaptok.DCDiT(config).eval()
    save_model(model, ModelCard(objective="flow"), tmp_path)
    again = load_model(tmp_path).model
    assert again.router.falloff == 1.0
    with torch.no_grad():
        assert torch.equal(model(*make_inputs()), again(*make_inputs()))


def test_a_router_of_ones_own_by_name():
    class Left(adaptok.Router):
        """Keeps the left half."""

        def __init__(self, share: float = 0.5) -> None:
            super().__init__()
            self.share = share

        def forward(self, tokens, context):
            w = tokens.grid[-1]
            column = torch.arange(tokens.x.shape[1]) % w
            prob = torch.where(column < self.share * w, 0.9, 0.1)
            return adaptok.Routing(prob.expand(tokens.x.shape[0], -1))

    adaptok.register_router("left-half-of-a-test")(Left)
    model = adaptok.DCDiT(adaptok.DCDiTConfig(**SIZES, router="left-half-of-a-test"))
    _, routing = model(*make_inputs(), return_routing=True)
    assert routing.keep_mask.view(2, 6, 8)[..., :4].all()
    assert routing.keep_mask.sum() == 48


def test_wrong_routers_are_refused():
    with pytest.raises(UnknownNameError, match="nobody"):
        adaptok.DCDiT(adaptok.DCDiTConfig(**SIZES, router="nobody"))
    with pytest.raises(ConfigError, match="fallof"):
        adaptok.DCDiT(adaptok.DCDiTConfig(**SIZES, router={"name": "cosine", "fallof": 1}))
    model = adaptok.DCDiT(adaptok.DCDiTConfig(**SIZES, router="random"))
    with pytest.raises(BudgetError, match="budget"):
        model(*make_inputs())
    reference = adaptok.DCDiT(adaptok.DCDiTConfig(**SIZES)).reference_state_dict()
    with pytest.raises(AdaptokError, match="router"):
        model.load_reference_state_dict(reference)
