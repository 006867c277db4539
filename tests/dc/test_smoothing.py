import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import cells_of, smooth_all_pairs

from adaptok.dc.smoothing import Blur, smooth_kept


def smooth_by_hand(h, prob, rows, b, grid, sigma):
    n = cells_of(grid).shape[0]
    out = torch.empty(h.shape, dtype=torch.float64)
    for sample in range(b):
        mine = rows // n == sample
        out[mine] = smooth_all_pairs(h[mine], prob[mine], rows[mine] % n, grid, sigma)
    return out


@settings(max_examples=40, deadline=None)
@given(
    grid=st.sampled_from([(6, 9), (1, 90), (200, 3), (3, 6, 7), (17,), (2, 100, 2)]),
    sigma=st.sampled_from([0.6, 1.0, 2.0]),
    share=st.floats(0.02, 1.0),
    seed=st.integers(0, 99),
)
def test_smoothing_is_that_of_all_pairs(grid, sigma, share, seed):
    generator = torch.Generator().manual_seed(seed)
    n = cells_of(grid).shape[0]
    mask = torch.rand(2 * n, generator=generator) < share
    mask[[0, n]] = True
    rows = mask.nonzero().squeeze(1)
    h = torch.randn(len(rows), 3, generator=generator)
    # probabilities from one to almost nothing: isolated cells of 1e-4 among confident ones
    prob = torch.where(torch.rand(len(rows), generator=generator) < 0.3, 1e-4, 1.0)
    prob = torch.where(torch.rand(len(rows), generator=generator) < 0.3, 0.6, prob)
    ours = smooth_kept(h, prob, rows, 2, grid, sigma)
    assert torch.allclose(ours.double(), smooth_by_hand(h, prob, rows, 2, grid, sigma), atol=1e-5)


@pytest.mark.parametrize("sigma", [1.0, 2.0])
@pytest.mark.parametrize("grid", [(64, 48), (4, 40, 40)])
def test_isolated_cells_of_least_probability_on_large_grids(grid, sigma):
    """At 6 sigma a confident neighbour still weighs as much as the cell itself."""
    n = cells_of(grid).shape[0]
    index = torch.arange(n).reshape(grid)
    lonely = index[(..., 20, 20)] if len(grid) == 2 else index[2, 20, 20]
    far = int(6.2 * sigma)
    strong = index[(..., 20, 20 + far)] if len(grid) == 2 else index[2, 20, 20 + far]
    rows = torch.tensor(sorted([lonely.item(), strong.item(), 0, n - 1]))
    prob = torch.where(rows == lonely, 1e-4, 1.0)
    h = torch.tensor([[1.0, 5.0], [-3.0, 2.0], [4.0, -9.0], [0.5, 0.1]])
    ours = smooth_kept(h, prob, rows, 1, grid, sigma)
    expected = smooth_by_hand(h, prob, rows, 1, grid, sigma)
    assert torch.allclose(ours.double(), expected, atol=1e-5)


@pytest.mark.parametrize(("grid", "sigma"), [((40, 50), 1.0), ((150, 3), 2.0), ((3, 2, 99), 1.0)])
def test_gradients_are_those_of_all_pairs(grid, sigma):
    n = cells_of(grid).shape[0]
    rows = (torch.rand(n) < 0.1).nonzero().squeeze(1)
    h = torch.randn(len(rows), 2, dtype=torch.float64, requires_grad=True)
    prob = torch.rand(len(rows), dtype=torch.float64, requires_grad=True)
    probe = torch.randn(len(rows), 2, dtype=torch.float64)
    ours = torch.autograd.grad(
        (smooth_kept(h, prob, rows, 1, grid, sigma) * probe).sum(), (h, prob)
    )
    expected = smooth_all_pairs(h, prob, rows, grid, sigma)
    theirs = torch.autograd.grad((expected * probe).sum(), (h, prob))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)


def test_blur_passes_gradcheck_twice():
    x = torch.randn(1, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Blur.apply(x, 0.8), (x,))
    assert torch.autograd.gradgradcheck(lambda x: Blur.apply(x, 0.8), (x,))


def test_probabilities_are_clamped_on_both_sides():
    """p = 1 keeps a trace of the neighbours, p = 0 a trace of itself."""
    h = torch.tensor([[1.0], [0.0]])
    rows = torch.tensor([0, 1])
    sure = smooth_kept(h, torch.tensor([1.0, 1.0]), rows, 1, (1, 2), 1.0)
    weight = torch.exp(torch.tensor(-0.5))
    assert sure[1].item() == pytest.approx((1e-4 * weight / (1 + weight)).item(), rel=1e-3)
    unsure = smooth_kept(h, torch.tensor([0.0, 0.0]), rows, 1, (1, 2), 1.0)
    assert unsure.isfinite().all()
    plain = 1e-4 / (1e-4 * (1 + weight) + 1e-8)
    assert unsure[0].item() == pytest.approx((1e-4 + (1 - 1e-4) * plain).item(), rel=1e-5)


def test_the_normaliser_is_there():
    """One lonely cell of p = 1e-4 loses 1e-8 / (1e-4 + 1e-8) of its value."""
    out = smooth_kept(torch.ones(1, 1), torch.tensor([1e-4]), torch.tensor([0]), 1, (3, 3), 1.0)
    assert 1 - out.item() == pytest.approx((1 - 1e-4) * 1e-8 / (1e-4 + 1e-8), rel=2e-3)


def test_a_sample_is_smoothed_alone():
    h, prob = torch.randn(3, 4), torch.rand(3)
    rows = torch.tensor([3, 9, 11])  # cell 3 of sample 0; cells 0 and 2 of sample 1
    out = smooth_kept(h, prob, rows, 2, (3, 3), 1.0)
    alone = smooth_kept(h[1:], prob[1:], rows[1:] - 9, 1, (3, 3), 1.0)
    assert torch.allclose(out[1:], alone, atol=1e-6)


@pytest.mark.parametrize("lonely", range(12, 35))
def test_no_neighbour_is_cut_off_where_a_block_of_the_blur_ends(lonely):
    """Just beyond 6 sigma a confident cell weighs 7e-6 of an unlikely one: seen if it is large."""
    sigma, grid = 2.0, (96,)
    rows = torch.tensor([lonely, lonely + 13])
    prob, h = torch.tensor([1e-4, 1.0]), torch.tensor([[0.0], [1e4]])
    for order in (rows, 95 - rows):
        ours = smooth_kept(h, prob, order, 1, grid, sigma)
        expected = smooth_by_hand(h, prob, order, 1, grid, sigma)
        assert expected[0].item() > 0.01
        assert torch.allclose(ours.double(), expected, rtol=1e-3)
