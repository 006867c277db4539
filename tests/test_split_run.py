"""A bias of keys and the attention of the first token, held against softmax by hand."""

import pytest
import torch
import torch.nn.functional as F
from backbones.split_checks import attend_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptok.errors import ShapeError
from adaptok.split_run import attend_class, join_bias

MASKS = {
    "none": lambda b, h, s: None,
    "added": lambda b, h, s: torch.randn(b, h, s, s),
    "added, of all": lambda b, h, s: torch.randn(1, 1, s, s),
    "hidden": lambda b, h, s: (torch.rand(b, 1, s, s) < 0.6) | torch.eye(s, dtype=torch.bool),
    "hidden keys": lambda b, h, s: (torch.arange(s) < s - 1).expand(b, 1, 1, s),
}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(1, 5)),
    mask=st.sampled_from(sorted(MASKS)),
    per_head=st.sampled_from([None, False, True]),
    scale=st.sampled_from([None, 0.3]),
)
def test_fused_attention_with_a_bias_is_softmax_by_hand(sizes, mask, per_head, scale):
    b, h, s, e = sizes
    q, k, v = torch.randn(3, b, h, s, e)
    made = MASKS[mask](b, h, s)
    bias = None if per_head is None else torch.randn((b, h, s) if per_head else (b, s))
    expected, weights = attend_by_hand(q, k, v, attn_mask=made, scale=scale, bias=bias)
    joined = join_bias(made, bias, q)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=joined, scale=scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    row = attend_class(q, k, joined, scale)
    torch.testing.assert_close(row, weights[:, :, 0], rtol=0, atol=1e-5)


def test_no_bias_is_the_mask_itself():
    q, mask = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 3)
    assert join_bias(mask, None, q) is mask
    assert join_bias(None, None, q) is None


def test_a_key_of_size_k_counts_like_k_keys():
    q, k, v = torch.randn(3, 2, 2, 4, 8)
    sizes = torch.tensor([[1, 3, 1, 2], [2, 1, 1, 1]])
    merged = F.scaled_dot_product_attention(q, k, v, attn_mask=join_bias(None, sizes.log(), q))
    for sample in range(2):
        rows = torch.arange(4).repeat_interleave(sizes[sample])
        apart = F.scaled_dot_product_attention(q[sample], k[sample, :, rows], v[sample, :, rows])
        torch.testing.assert_close(merged[sample], apart, rtol=0, atol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_ranking_in_half_precision_has_no_ties(half):
    q, k = torch.randn(2, 1, 1, 200, 16).to(half)
    row = attend_class(q, k, join_bias(None, torch.rand(1, 200), q))
    assert row.dtype == torch.float32
    exact = attend_class(q.double(), k.double(), None)
    assert exact.dtype == torch.float64
    assert row.to(half).unique().numel() < row.unique().numel()


def test_gradients_come_through_bias_and_row():
    q, k, v = torch.randn(3, 2, 2, 4, 8, dtype=torch.float64).requires_grad_()
    bias = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def run(q, k, bias):
        joined = join_bias(None, bias, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=joined), attend_class(q, k, joined)

    assert torch.autograd.gradcheck(run, (q, k, bias))


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2, 5, 3), (3,), (2, 1, 1, 3)])
def test_a_bias_of_a_wrong_shape_is_refused(shape):
    q = torch.randn(2, 4, 3, 8)
    with pytest.raises(ShapeError, match=r"3 keys, \(2, 3\) or \(2, 4, 3\), got"):
        join_bias(None, torch.zeros(shape), q)
