"""The pure functions: places, ranking, annealing, predictor, distillation."""

import math

import pytest
import torch
from adaptok_prune.annealing import anneal_keep_rate
from adaptok_prune.distilling import distillation_loss
from adaptok_prune.places import choose_blocks
from adaptok_prune.predictor import KeepPredictor, draw_kept
from adaptok_prune.ranking import choose_tokens
from hypothesis import given
from hypothesis import strategies as st
from prune_oracles import predict, sort_down

from adaptok.errors import ConfigError, ShapeError, StackError
from adaptok.testing import fill_weights


def test_quarters_of_any_depth():
    assert choose_blocks(None, 0, 12) == (3, 6, 9)
    assert choose_blocks(None, 0, 24) == (6, 12, 18)
    assert choose_blocks(None, 4, 8) == (5, 6, 7)
    assert choose_blocks(None, 5, 7) == (5, 6)
    assert choose_blocks(None, 0, 1) == (0,)


def test_given_blocks_lie_inside():
    assert choose_blocks((3, 6, 9), 0, 12) == (3, 6, 9)
    assert choose_blocks((3, 6, 9), 3, 5) == (3,)  # as when a wrap is tried
    assert choose_blocks((3, 6, 9), 0, 2) == ()
    with pytest.raises(StackError, match="block 9, and the blocks here are 0 to 8"):
        choose_blocks((3, 6, 9), 0, 9)
    with pytest.raises(StackError, match="block 6, 9, and the blocks here are 3 to 4"):
        choose_blocks((3, 6, 9), 3, 5, short=0)


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=9),
    st.data(),
    st.booleans(),
)
def test_choices_equal_a_loop(scores, data, fuse):
    m = len(scores)
    counts = tuple(data.draw(st.lists(st.integers(1, m), min_size=2, max_size=2)))
    batch = torch.tensor([scores, scores[::-1]])
    choice = choose_tokens(batch, counts, fuse=fuse)
    assert choice.places.shape == (2, max(counts))
    for sample, count in enumerate(counts):
        order = sort_down(batch[sample])
        stay = count - 1 if fuse and count < m else count
        kept = sorted(order[:stay])
        places = kept + ([order[stay]] if stay < count else [])
        assert choice.places[sample, :count].tolist() == places
        rest = stay if fuse else -1
        owner = [kept.index(i) if i in kept else rest for i in range(m)]
        assert choice.owner[sample].tolist() == owner
        assert choice.fused[sample, :count].tolist() == [
            stay < count and i == stay for i in range(count)
        ]
        alone = choose_tokens(batch[sample : sample + 1], count, fuse=fuse)
        assert alone.lengths is None
        assert torch.equal(alone.owner[0], choice.owner[sample])
        assert alone.places[0].tolist() == places


def test_annealing_is_a_falling_cosine():
    rates = [anneal_keep_rate(step, 10, 30, 0.5) for step in range(40)]
    assert rates[:11] == [1.0] * 11
    assert rates[30:] == [0.5] * 10
    assert rates[20] == pytest.approx(0.75)
    assert rates[15] == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 4)))
    assert sorted(rates, reverse=True) == rates
    with pytest.raises(ConfigError, match="start=5 and end=5"):
        anneal_keep_rate(0, 5, 5, 0.7)
    with pytest.raises(ConfigError, match=r"final keep rate is a share in \(0, 1\], got 0"):
        anneal_keep_rate(0, 0, 5, 0.0)


@pytest.mark.parametrize("width", [16, 18, 27])
def test_the_predictor_equals_the_loop_over_those_that_are_left(width):
    predictor = fill_weights(KeepPredictor(width))
    x = torch.randn(3, 10, width)
    mask = (torch.rand(3, 10) < torch.tensor([0.3, 0.9, 0.6])[:, None]).float()
    mask[:, 0] = 1.0
    with torch.no_grad():
        found = predictor(x, mask)
        for sample in range(3):
            left = mask[sample] == 1
            expected = predict(predictor, x[sample][left])
            assert torch.allclose(found[sample][left], expected, atol=1e-5)
    assert not torch.allclose(predictor(x, torch.ones(3, 10)), found, atol=1e-3)


def test_the_predictor_wants_room():
    with pytest.raises(ConfigError, match="at least 8 features"):
        KeepPredictor(6)


def test_draws_follow_the_probability():
    chance = torch.tensor([0.1, 0.5, 0.9]).repeat(4000, 1)
    log_prob = torch.stack([chance, 1 - chance], dim=-1).log().requires_grad_()
    drawn = draw_kept(log_prob)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn.mean(0), chance[0], atol=0.03)
    drawn.sum().backward()
    assert torch.all(log_prob.grad[..., 0] >= 0)
    assert log_prob.grad[..., 0].mean() > 0.05


class TestDistillation:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    wanted = torch.tensor([[1.5, 1.0, 0.0], [0.0, 1.0, 2.0]])

    def test_the_sum_is_that_of_the_loop(self):
        tokens, target = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
        mask = torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
        p, q = self.wanted.softmax(-1), self.logits.softmax(-1)
        divergence = (p * (p / q).log()).sum() / 2
        distances = [
            float(((tokens[b, i] - target[b, i]) ** 2).mean())
            for b in range(2)
            for i in range(5)
            if mask[b, i]
        ]
        found = distillation_loss(self.logits, self.wanted, tokens, target, mask)
        expected = 0.5 * float(divergence) + 0.5 * sum(distances) / 4
        assert found.item() == pytest.approx(expected, rel=1e-5)
        heavier = distillation_loss(
            self.logits, self.wanted, tokens, target, mask, logit_weight=2.0, token_weight=0.0
        )
        assert heavier.item() == pytest.approx(2 * float(divergence), rel=1e-5)

    def test_teacher_and_mask_get_no_gradient(self):
        leaves = [
            torch.randn(shape, requires_grad=True)
            for shape in ((2, 3), (2, 3), (2, 5, 4), (2, 5, 4), (2, 5))
        ]
        distillation_loss(*leaves).backward()
        assert [leaf.grad is not None for leaf in leaves] == [True, False, True, False, False]

    def test_none_left_is_no_division_by_zero(self):
        x = torch.randn(2, 5, 4)
        loss = distillation_loss(self.logits, self.logits, x, x + 1, torch.zeros(2, 5))
        assert loss.item() == pytest.approx(0.0, abs=1e-6)

    def test_what_does_not_fit(self):
        x = torch.randn(2, 5, 4)
        with pytest.raises(ShapeError, match="give both"):
            distillation_loss(self.logits, self.wanted, x)
        with pytest.raises(ShapeError, match="leave class and register tokens out"):
            distillation_loss(self.logits, self.wanted, x, x, torch.ones(2, 4))
