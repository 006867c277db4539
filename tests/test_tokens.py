import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptok import Tokens
from adaptok.errors import DeviceError, ShapeError
from adaptok.tokens import pack, unpack


@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=5), width=st.integers(1, 4))
def test_unpack_and_pack_are_inverse(counts, width):
    total = sum(counts)
    batch = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ptr = torch.tensor([0, *counts]).cumsum(0)
    packed = Tokens(torch.randn(total, width), (total,), torch.arange(total), batch=batch, ptr=ptr)
    dense = unpack(packed)
    assert dense.x.shape == (len(counts), max(counts), width)
    assert dense.counts.tolist() == counts
    again = pack(dense)
    for name in ("x", "cells", "batch", "ptr"):
        assert torch.equal(getattr(again, name), getattr(packed, name)), name
    assert again.grid == packed.grid


@given(st.data())
def test_pack_and_unpack_are_inverse_where_padding_lies_behind(data):
    counts = torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    counts[0] = 5
    valid = torch.arange(5) < counts[:, None]
    x = torch.randn(len(counts), 5, 3) * valid[..., None]
    dense = Tokens(x, valid=valid)
    again = unpack(pack(dense))
    assert torch.equal(again.x, x)
    assert again.valid is None if bool(valid.all()) else torch.equal(again.valid, valid)


def test_padding_between_tokens_is_left_out():
    x = torch.arange(8.0).reshape(2, 4, 1)
    valid = torch.tensor([[False, True, False, True], [True, False, False, False]])
    packed = pack(Tokens(x, (2, 2), valid=valid))
    assert packed.x.flatten().tolist() == [1, 3, 4]
    assert packed.cells.tolist() == [1, 3, 0]
    assert packed.counts.tolist() == [2, 1]


def test_dense_tokens_without_padding_keep_their_values_and_grid():
    tokens = Tokens(torch.randn(3, 12, 2), (3, 4))
    packed = pack(tokens)
    assert packed.cells.tolist() == list(range(12)) * 3
    assert torch.equal(unpack(packed).x, tokens.x)
    assert unpack(packed).valid is None


def test_video_grid():
    assert Tokens(torch.zeros(1, 24, 2), (2, 3, 4)).grid == (2, 3, 4)


def test_with_x_keeps_the_rest():
    packed = pack(Tokens(torch.randn(2, 6, 4), (2, 3)))
    wider = packed.with_x(torch.randn(12, 9))
    assert wider.width == 9
    assert wider.ptr is packed.ptr
    assert wider.grid == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tokens(torch.zeros(2, 6, 4), (2, 4)), "grid .* has 8 cells, but 6 tokens"),
        (lambda: Tokens(torch.zeros(2, 6, 4), (6, 0)), "axes of positive length"),
        (lambda: Tokens(torch.zeros(6, 4)), "dense tokens has 3 axes"),
        (lambda: Tokens(torch.zeros(6, 4), batch=torch.zeros(6).long()), "both batch and ptr"),
        (
            lambda: Tokens(torch.zeros(2, 6, 4), valid=torch.ones(2, 5).bool()),
            r"valid needs the shape \(2, 6\), got \(2, 5\)",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ShapeError, match=message):
        make()


def test_parts_on_several_devices_are_refused():
    with pytest.raises(DeviceError, match="cells lies on meta and x on cpu"):
        Tokens(torch.zeros(1, 4, 2), cells=torch.zeros(1, 4, dtype=torch.long, device="meta"))


def test_packing_twice_is_refused():
    packed = pack(Tokens(torch.zeros(2, 3, 4)))
    with pytest.raises(ShapeError, match="packed already"):
        pack(packed)
    with pytest.raises(ShapeError, match="dense already"):
        unpack(unpack(packed))
