"""What a model of one's own does between its blocks would be left out: the probe must see it."""

import pytest
import torch
from torch import nn

import adaptok
from adaptok.errors import HandOverError, ProbeError
from adaptok.testing.models import fill_weights

DEPTH = 5


class Own(nn.Module):
    """A model that calls its blocks one after the other, with a twist in front of one of them."""

    def __init__(self, twist=None, place=0):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, stride=8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True, dropout=0.0)
            for _ in range(DEPTH)
        )
        self.join = nn.Linear(64, 32)
        self.twist, self.place = twist, place

    def forward(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)
        seen = []
        for index, block in enumerate(self.blocks):
            if index == self.place and self.twist is not None:
                x = self.twist(self, x, seen)
            x = block(x)
            seen.append(x)
        return x.mean(1)


TWISTS = {
    "tanh": lambda model, x, seen: torch.tanh(x),
    "scale": lambda model, x, seen: 0.9 * x,
    "skip": lambda model, x, seen: model.join(torch.cat([x, seen[0]], -1)) if seen else x,
}


def wrap(model, **options):
    host = adaptok.ListBackbone(blocks="blocks", grid=(4, 6), prefix=0)
    return adaptok.wrap(fill_weights(model).eval(), backbone=host, **options)


@pytest.mark.parametrize("place", range(DEPTH))
@pytest.mark.parametrize("twist", TWISTS)
@pytest.mark.parametrize("how", [{"chunker": "dc", "budget": 0.5}, {"stack": ["tome"]}], ids=str)
def test_work_between_blocks_is_refused(twist, place, how):
    image = torch.randn(2, 3, 32, 48)
    model = Own(TWISTS[twist], place)
    if place == 0:  # in front of the first block: the same in a wrapped list
        with torch.no_grad():
            expected = fill_weights(model).eval()(image)
            wrapped = wrap(model, **{**how, "budget": 1.0})
            torch.testing.assert_close(wrapped(image), expected, rtol=1e-4, atol=1e-4)
        return
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ProbeError, match=r"work between the blocks .* move it into the blocks"):
        wrap(model, **how)
    assert not adaptok.is_wrapped(model)
    assert [name for name, _ in model.named_modules()] == names


def test_a_span_of_a_plain_loop_is_accepted():
    model, image = Own(), torch.randn(2, 3, 32, 48)
    wrapped = wrap(model, chunker="dc", budget=0.5, span=(1, 4))
    with adaptok.trace(wrapped) as seen:
        wrapped(image)
    assert seen.steps[0].kept.tolist() == [12, 12]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": lambda image: 24}, r"returns the lengths of the grid axes.*got 24"),
        ({"grid": lambda: (4, 6)}, "does not take them: too many positional arguments"),
        ({"inputs": lambda model: torch.randn(2, 3, 32, 48)}, r"returns adaptok.HostInputs"),
    ],
    ids=["number", "no-arguments", "tensor"],
)
def test_wrong_functions_are_refused(options, words):
    example = adaptok.HostInputs((torch.randn(2, 3, 32, 48),))
    given = {"grid": (4, 6), "inputs": lambda model: example} | options
    host = adaptok.ListBackbone(blocks="blocks", **given)
    with pytest.raises(HandOverError, match=words):
        adaptok.wrap(Own().eval(), chunker="dc", budget=0.5, backbone=host)
