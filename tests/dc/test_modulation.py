"""Modulation of dense and packed tokens, against plain formulas."""

import pytest
import torch

from adaptok.attention import Ragged
from adaptok.dc.modulation import add_gated, modulate

LENGTHS = (3, 1, 4, 2)


def make(lengths=LENGTHS, d=5):
    torch.manual_seed(0)
    counts = torch.tensor(lengths)
    batch = torch.arange(len(lengths)).repeat_interleave(counts)
    ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    x, y = torch.randn(2, sum(lengths), d, dtype=torch.float64).unbind(0)
    a, b = torch.randn(2, len(lengths), d, dtype=torch.float64).unbind(0)
    return Ragged(batch, ptr, lengths), [z.clone().requires_grad_() for z in (x, y, a, b)]


# as many samples as tokens, too: shapes alone do not tell which is which
@pytest.mark.parametrize("lengths", [LENGTHS, (1, 1, 1)])
def test_packed_tokens_and_gradients(lengths):
    ragged, (x, y, a, b) = make(lengths)
    pairs = [
        (modulate(x, a, b, ragged), x * (1 + b[ragged.batch]) + a[ragged.batch], (x, a, b)),
        (add_gated(x, a, y, ragged), x + a[ragged.batch] * y, (x, a, y)),
    ]
    for out, expected, leaves in pairs:
        torch.testing.assert_close(out, expected)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads = torch.autograd.grad((weights * out).sum(), leaves)
        known = torch.autograd.grad((weights * expected).sum(), leaves)
        for found, right in zip(grads, known, strict=True):
            torch.testing.assert_close(found, right)


def test_dense_tokens_are_the_packed_ones():
    ragged, (x, y, a, b) = make((3, 3, 3, 3))
    for function, given in ((modulate, (x, a, b)), (add_gated, (x, a, y))):
        packed = function(*given, ragged)
        dense = [z.view(4, 3, -1) if z.shape[0] == 12 else z for z in given]
        torch.testing.assert_close(function(*dense).flatten(0, 1), packed)


def test_packed_tokens_keep_only_one_vector_per_sample_for_the_gradient():
    ragged, (x, y, a, b) = make((40, 60))
    kept = []

    def note(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = add_gated(modulate(x, a, b, ragged), a, y, ragged)
    assert out.shape == (100, 5)
    rows = [shape for shape in kept if shape == (100, 5)]
    assert len(rows) == 2  # what was modulated, and what was gated


def test_half_precision_gradients_have_the_types_of_their_tensors():
    ragged, (x, _, a, b) = make()
    x, a, b = (z.detach().bfloat16().requires_grad_() for z in (x, a, b))
    modulate(x, a, b, ragged).sum().backward()
    assert {z.grad.dtype for z in (x, a, b)} == {torch.bfloat16}


def test_gradients_of_gradients():
    ragged, (x, y, a, b) = make((2, 3))
    assert torch.autograd.gradgradcheck(lambda *z: modulate(*z, ragged), (x, a, b))
    assert torch.autograd.gradgradcheck(lambda *z: add_gated(*z, ragged), (x, a, y))


def test_frozen_vectors_cost_nothing():
    ragged, (x, _, a, b) = make()
    modulate(x, a.detach(), b.detach(), ragged).sum().backward()
    torch.testing.assert_close(x.grad, (1 + b.detach())[ragged.batch])
