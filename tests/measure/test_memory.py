"""Peak memory of functions whose peak is known."""

import pytest
import torch
from torch import nn

from adaptok.measure import LiveMemory, measure_peak

CPU = torch.device("cpu")
KB = 4 * 250  # bytes of 250 numbers


def make(kilobytes):
    return torch.ones(250 * kilobytes)


def chain():
    """Two of these live at once, whatever the length of the chain."""
    x = make(3)
    for _ in range(5):
        x = x + 1
    return x


def hoard():
    kept = [make(3)]
    for _ in range(5):
        kept.append(kept[-1] + 1)
    return kept


PEAKS = {
    "one tensor": (lambda: make(7), 7),
    "chain": (chain, 6),
    "hoard": (hoard, 18),
    "views hold nothing of their own": (lambda: make(4).view(2, -1).t(), 4),
    "nor does work in place": (lambda: make(4).mul_(2).add_(1), 4),
    "two results": (lambda: (make(5), make(2)), 7),
    "the large one is gone when the small one comes": (lambda: make(8).sum() * make(1), 8),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_of_known_calls(name):
    call, kilobytes = PEAKS[name]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert measure_peak(call, CPU) == pytest.approx(kilobytes * KB, abs=16)


def test_inputs_and_weights_are_not_counted():
    layer, x = nn.Linear(250, 250), make(4).view(4, 250)
    with torch.no_grad():
        assert measure_peak(lambda: layer(x), CPU) == 4 * KB
        assert measure_peak(lambda: x.mul_(2), CPU) == 0


def test_compositions_count_their_parts_in_inference_mode():
    q = torch.randn(1, 2, 50, 4)

    def attend():  # dropout makes it fall apart: the map of attention is a tensor
        return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    with torch.inference_mode():
        assert measure_peak(attend, CPU) >= 4 * 2 * 50 * 50


def test_what_lives_on_is_still_counted_after_the_peak():
    with LiveMemory() as memory:
        x = make(3)
        y = make(4)
        del x
        z = y * 2
    assert memory.now == 8 * KB
    assert memory.peak == 8 * KB
    del y, z
    assert memory.now == 0


def test_what_needs_a_gradient_keeps_more():
    x = make(3).requires_grad_()
    with torch.no_grad():
        without = measure_peak(lambda: x.exp().sin().cos().sum(), CPU)
    assert measure_peak(lambda: x.exp().sin().cos().sum(), CPU) > without
