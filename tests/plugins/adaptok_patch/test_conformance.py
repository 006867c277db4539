"""The kit's checks; in each, parts run alone and inside a small ViT."""

from typing import ClassVar

import pytest

import adaptok
from adaptok.testing import ChunkerTests, DechunkerTests, RouterTests


class TestRouter(RouterTests):
    part = "apt"


class TestRouterWithOptions(RouterTests):
    part: ClassVar = {"name": "apt", "scales": (1, 4), "thresholds": (1.0,)}


class TestBucketed(ChunkerTests):
    part = "apt"


class TestPacked(ChunkerTests):
    part: ClassVar = {"name": "apt", "layout": "packed", "learned": False}


class TestFixed(ChunkerTests):
    part: ClassVar = {"name": "apt", "layout": "fixed", "scales": (1, 2), "token": "mean"}


class TestBehindAnotherRouter(ChunkerTests):
    part: ClassVar = {"name": "apt", "learned": False}
    router = "dc"


class TestDechunker(DechunkerTests):
    part = "apt"


class TestDechunkerOfPatches(DechunkerTests):
    part = "apt"
    chunker = "apt"


@pytest.mark.parametrize("kind", ["routers", "chunkers", "dechunkers"])
def test_the_name_is_announced(kind):
    assert "apt" in adaptok.available(kind)
