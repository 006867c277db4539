"""adaptok's own parts pass the kit that others are asked to pass."""

import pytest
import torch
from testing.small_hosts import PATCH, WIDTH, JointBackbone, JointHost, make_inputs
from torch import nn

from adaptok import HostInputs, ListBackbone, available
from adaptok.chunk_stage import ChunkStage
from adaptok.dc.host import HostChunker, HostDechunker, HostRouter
from adaptok.testing import (
    BackboneTests,
    ChunkerTests,
    DechunkerTests,
    OwnFeatures,
    StageTests,
    check_backbone,
    check_router,
    make_vit,
)


@pytest.mark.parametrize("name", available("routers"))
def test_routers(name):
    report = check_router(name)
    report.raise_failed()
    assert set(report.not_run) <= {"starts_full", "gradient", "batch"}, report
    if name != "random":
        assert "batch" in report.passed


def test_a_router_with_other_options_and_another_width():
    check_router({"name": "random", "seed": 3}).raise_failed()
    only = ["options", "identity", "gradient"]
    check_router({"name": "dc", "prior": None, "bias": 3.0}, only=only).raise_failed()
    check_router(HostRouter(48), width=48, only=only).raise_failed()


class TestBucketed(ChunkerTests):
    part = "dc"


class TestFixed(ChunkerTests):
    part = {"name": "dc", "layout": "fixed", "target": 3.0}  # noqa: RUF012


class TestPacked(ChunkerTests):
    part = {"name": "dc", "layout": "packed"}  # noqa: RUF012
    skip = {"compile": "counts of the packed layout are read off the device"}  # noqa: RUF012


class TestHostDechunker(DechunkerTests):
    part = "dc"


class TestOwnFeatures(DechunkerTests):
    part = OwnFeatures


class TestChunkStage(StageTests):
    def make(self):
        return ChunkStage(HostRouter(96), HostChunker(), HostDechunker(96), "dc")


class TestTimm(BackboneTests):
    backbone = "timm-vit"

    def make(self):
        return make_vit()

    def refused(self):
        image = torch.zeros(1, 3, 32, 48)
        return {"indices=": lambda model: model.forward_intermediates(image, indices=[1])}


class PlainHost(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
            for _ in range(2)
        )

    def forward(self, image):
        x = self.embed(image).flatten(2).mT
        for layer in self.layers:
            x = layer(x)
        return x.cumsum(1)


def make_image(model):
    (image, _) = make_inputs().args
    return HostInputs((image,))


def make_two(model):
    (image, _) = make_inputs(b=2).args
    return HostInputs((image,))


def test_a_plain_list():
    host = ListBackbone(blocks="layers", grid=(4, 6), inputs=make_two)
    skip = {"example": "its own inputs are given"}
    report = check_backbone(host, PlainHost, inputs=make_image, skip=skip)
    report.raise_failed()
    assert set(report.not_run) == {"example", "checkpointing", "refused"}, report


def test_a_prefix_that_is_not_there_is_caught():
    host = ListBackbone(blocks="layers", grid=(1, 23), prefix=1, inputs=make_two)
    assert "cells" in check_backbone(host, PlainHost, inputs=make_image, only=["cells"]).failed


def test_a_host_may_be_given_as_an_instance():
    report = check_backbone(JointBackbone, JointHost(), only=["identity", "deepcopy", "unwrap"])
    assert report.passed == ("identity", "deepcopy", "unwrap")
