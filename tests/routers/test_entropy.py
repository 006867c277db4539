import pytest
import torch
from routers.fields import make_noise

from adaptok import Context, Tokens
from adaptok.routers import EntropyRouter, entropy
from adaptok.routers.entropy import measure_entropy
from adaptok.routers.untrained import find_directions


def test_entropy_is_that_of_a_distribution():
    x = make_noise((3, 5), d=4)
    unit = x / x.norm(dim=-1, keepdim=True)
    ours = measure_entropy(unit, 0.4)
    for sample in range(3):
        for i in range(15):
            logits = (unit[sample] @ unit[sample, i]) / 0.4
            expected = torch.distributions.Categorical(logits=logits).entropy()
            assert torch.allclose(ours[sample, i], expected, atol=1e-5)
    prob = EntropyRouter(0.4)(Tokens(x, (3, 5)), Context()).keep_prob
    assert torch.allclose(prob, (-measure_entropy(find_directions(x), 0.4)).exp())


@pytest.mark.parametrize("sizes", [(1, 2, 3), (4, 1, 1, 6), (5, 5)])
def test_equal_cells_share_one_probability(sizes):
    kinds = torch.cat([torch.full((size,), kind) for kind, size in enumerate(sizes)])
    kinds = kinds[torch.randperm(len(kinds))]  # wherever in the grid they are
    x = torch.eye(len(sizes) + 1)[kinds][None]
    prob = EntropyRouter(0.02)(Tokens(x, (1, len(kinds))), Context()).keep_prob[0]
    expected = torch.tensor([1 / sizes[kind] for kind in kinds])
    assert torch.allclose(prob, expected, atol=1e-3)
    assert prob.sum().item() == pytest.approx(len(sizes), abs=0.01)


def test_a_higher_temperature_finds_more_look_alikes():
    tokens = Tokens(make_noise((4, 5)), (4, 5))
    low, high = (EntropyRouter(t)(tokens, Context()).keep_prob for t in (0.1, 0.5))
    assert (high < low).all()


def test_rows_at_once_do_not_change_the_result(monkeypatch):
    x = find_directions(make_noise((4, 5)))
    expected = measure_entropy(x, 0.1)
    monkeypatch.setattr(entropy, "ROWS", 7)
    assert torch.allclose(measure_entropy(x, 0.1), expected, atol=1e-6)
