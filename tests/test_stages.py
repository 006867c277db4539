"""Stages that look at the host's blocks: when a wrap is made, and when they run."""

import pytest
import torch
from torch import nn

import adaptok
from adaptok import BlockRange, Effects, Stage
from adaptok.errors import StackError
from adaptok.testing import make_vit


class Look(Stage):
    """Makes a weight for each block, and runs the blocks by themselves."""

    effects = Effects("width")
    name = "look"

    def meet(self, inner):
        self.met = [type(inner.module(i)).__name__ for i in range(inner.first, inner.last)]
        self.scales = nn.ParameterList(torch.ones(()) for _ in self.met)
        self.begin = inner.first
        self.seen = []

    def forward(self, inner, call):
        x = call.x
        for block in range(inner.first, inner.last):
            self.seen.append(block)
            x = self.scales[block - self.begin] * inner.module(block)(x)
        return call.with_x(x)


class Refuse(Look):
    def meet(self, inner):
        raise StackError("not these")


def test_a_stage_meets_the_blocks_of_its_span_and_makes_weights():
    vit, stage = make_vit(), Look()
    before = list(vit.state_dict())
    adaptok.wrap(vit, stack=[stage], span=(1, 3))
    assert stage.met == ["Block", "Block"]
    assert {"blocks.adaptok.look.scales.0", "blocks.adaptok.look.scales.1"} <= set(vit.state_dict())
    adaptok.unwrap(vit)
    assert list(vit.state_dict()) == before


def test_a_stage_runs_the_blocks_that_it_names():
    vit, image = make_vit().eval(), torch.randn(2, 3, 32, 48)
    expected = vit(image)
    stage = Look()
    adaptok.wrap(vit, stack=[stage], span=(1, 3))
    assert set(stage.seen) == {1, 2}  # the probe, with a list that was cut short
    stage.seen.clear()
    assert torch.allclose(vit(image), expected, atol=1e-5)
    assert stage.seen == [1, 2]


def test_a_stage_that_refuses_leaves_the_model_as_it_was():
    vit, image = make_vit().eval(), torch.randn(2, 3, 32, 48)
    expected, keys = vit(image), list(vit.state_dict())
    with pytest.raises(StackError, match="not these"):
        adaptok.wrap(vit, stack=[Refuse()])
    assert not adaptok.is_wrapped(vit)
    assert list(vit.state_dict()) == keys
    assert torch.equal(vit(image), expected)


def test_modules_are_hidden_behind_a_stage_and_where_there_are_none():
    def run(call, first, last):
        return call

    inner = BlockRange(run, 0, 2, find_module=lambda block: nn.Identity())
    assert isinstance(inner.module(1), nn.Identity)
    with pytest.raises(StackError, match="a stage of the class Look stands before them"):
        inner.around(Look()).module(1)
    with pytest.raises(StackError, match="no block list of a wrapped model"):
        BlockRange(run, 0, 2).module(0)
