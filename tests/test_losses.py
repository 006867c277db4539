import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptok import Routing
from adaptok.errors import ConfigError, ShapeError
from adaptok.losses import ratio_loss


@given(
    b=st.integers(1, 9), group=st.one_of(st.none(), st.integers(1, 10)), target=st.floats(1.5, 9)
)
def test_ratio_loss_is_the_formula(b, group, target):
    prob = torch.rand(b, 13, dtype=torch.float64)
    losses = []
    size = b if group is None else min(group, b)
    for start in range(0, b, size):
        part = prob[start : start + size]
        f, g = (part > 0.5).double().mean(), part.mean()
        losses.append(target / (target - 1) * ((target - 1) * f * g + (1 - f) * (1 - g)))
    assert ratio_loss(Routing(prob), target, group).item() == pytest.approx(
        torch.stack(losses).mean().item(), rel=1e-5
    )


def test_a_group_may_be_uneven_inside():
    # half of the samples keep all, half nothing: as one group on target, alone far from it
    prob = torch.cat([torch.full((2, 8), 0.99), torch.full((2, 8), 0.01)])
    assert ratio_loss(Routing(prob), 2.0, 4) < ratio_loss(Routing(prob), 2.0, 1)


def test_gradient_flows_through_probabilities_only():
    prob = torch.rand(4, 6, requires_grad=True)
    ratio_loss(Routing(prob)).backward()
    share = (prob > 0.5).float().mean().item()
    slope = 4 / 3 * (3 * share - (1 - share)) / prob.numel()
    assert torch.allclose(prob.grad, torch.full_like(prob, slope))


def test_a_budget_does_not_change_the_loss():
    prob = torch.rand(2, 8)
    budgeted = Routing(prob).with_keep_mask(torch.zeros(2, 8).bool())
    assert ratio_loss(budgeted) == ratio_loss(Routing(prob))


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="compression above 1, got 1"):
        ratio_loss(Routing(torch.rand(1, 2)), target=1.0)
    with pytest.raises(ConfigError, match="at least 1 sample"):
        ratio_loss(Routing(torch.rand(1, 2)), group_size=0)
    with pytest.raises(ShapeError, match="needs a natural mask"):
        ratio_loss(Routing(torch.rand(1, 2), threshold=None))
