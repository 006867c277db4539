"""The checks that adaptok gives to every plug-in."""

from dataclasses import replace
from typing import ClassVar

import torch
from adaptok_prune.evit import EViT

import adaptok
import adaptok.testing
from adaptok.split_run import Attended
from adaptok.testing import StageTests


class ToyHalves:
    """The kit's blocks have no attention: all of a block is its second half."""

    def __init__(self, inner):
        self.inner = inner

    def attend(self, block, call, *, key_bias=None, keys=False, class_attention=False):
        seen = None
        if class_attention:
            x = call.x.float()
            seen = torch.einsum("bhe,bshe->bhs", *(v.unflatten(-1, (3, -1)) for v in (x[:, 0], x)))
            seen = (seen / x.shape[-1]).softmax(-1)
        return Attended(call, None, seen)

    def finish(self, block, call):
        return self.inner.run(call, block, block + 1)


class HalvedEViT(EViT):
    """EViT where the kit calls it on blocks without halves, and on tokens without a class."""

    def forward(self, inner, call):
        if not inner.can_split:
            inner = replace(inner, halves=ToyHalves(inner))
            after = super().forward(inner, replace(call, has_class=True))
            return replace(after, has_class=call.has_class)
        return super().forward(inner, call)


class TestFused(StageTests):
    part = HalvedEViT


class TestDropped(StageTests):
    def make(self):
        return HalvedEViT(fuse=False, fill=0.0)


class TestDynamicViT(StageTests):
    # two sites: the kit trains two blocks, and a third predictor would get no gradient
    part: ClassVar = {"name": "dynamicvit", "blocks": (0, 1)}


def test_options_make_the_same_stage_again():
    wanted = {"name": "evit", "blocks": (0, 1), "keep_rate": 0.5, "fuse": False, "fill": 0.0}
    for part in ("evit", wanted):
        report = adaptok.testing.check_stage(
            part, only=["options", "identity", "budgets", "gradient", "checkpointing", "unwrap"]
        )
        report.raise_failed()
        assert not report.not_run


def test_both_names_are_announced():
    assert {"evit", "dynamicvit"} <= set(adaptok.available("stages"))
    assert adaptok.describe("evit").entries[0].origin == "prune"
