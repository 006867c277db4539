import dataclasses

import pytest
import torch

from adaptok import Context, Router, Routing, Tokens
from adaptok.errors import DtypeError, RoutingError, ShapeError


def test_a_tie_with_the_threshold_is_not_kept():
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    routing = Routing(torch.stack([torch.tensor(0.5), above, torch.tensor(0.2)])[None])
    assert routing.natural_mask.tolist() == [[False, True, False]]


def test_another_threshold_and_none():
    prob = torch.tensor([[0.1, 0.9]])
    assert Routing(prob, threshold=0.05).natural_mask.all()
    assert Routing(prob, threshold=None).natural_mask is None


def test_kept_needs_a_budget():
    routing = Routing(torch.rand(2, 4))
    with pytest.raises(ShapeError, match="no keep_mask yet"):
        _ = routing.kept
    mask = torch.tensor([[True, False, False, False], [True] * 4])
    assert routing.with_keep_mask(mask).kept.tolist() == [1, 4]


def test_routing_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Routing(torch.rand(1, 2)).keep_prob = torch.rand(1, 2)


def test_wrong_parts_are_refused():
    with pytest.raises(ShapeError, match=r"keep_prob needs the shape \(b, n\)"):
        Routing(torch.rand(1, 2, 3))
    with pytest.raises(ShapeError, match="keep_mask needs the shape"):
        Routing(torch.rand(1, 2), torch.ones(1, 3).bool())
    with pytest.raises(DtypeError, match=r"natural_mask needs booleans, got torch\.int64"):
        Routing(torch.rand(1, 2), natural_mask=torch.ones(1, 2).long())
    with pytest.raises(DtypeError, match="floating-point"):
        Routing(torch.ones(1, 2).long())


def test_a_router_without_forward_cannot_be_made():
    class Nothing(Router):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Nothing()


def test_a_router_of_ten_lines():
    class Norm(Router):
        def forward(self, tokens, context):
            return Routing(tokens.x.norm(dim=-1).sigmoid(), threshold=None)

    routing = Norm()(Tokens(torch.randn(2, 6, 4), (2, 3)), Context())
    assert routing.keep_prob.shape == (2, 6)


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_what_is_no_probability_is_refused(value):
    prob = torch.rand(2, 5)
    prob[1, 3] = value
    with pytest.raises(RoutingError, match=r"probabilities in \[0, 1\].*sigmoid"):
        Routing(prob)
