"""The checks that adaptok gives to every plug-in."""

from typing import ClassVar

import adaptok
from adaptok.testing import ChunkerTests, DechunkerTests, RouterTests


class TestRaster(RouterTests):
    part = "hnet"


class TestHilbert(RouterTests):
    part: ClassVar = {"name": "hnet", "scan": "hilbert"}


class TestBucketed(ChunkerTests):
    part = "hnet"


class TestFixed(ChunkerTests):
    part: ClassVar = {"name": "hnet", "scan": "hilbert", "layout": "fixed"}


class TestPacked(ChunkerTests):
    part: ClassVar = {"name": "hnet", "scan": "snake", "layout": "packed"}


class TestDechunker(DechunkerTests):
    part = "hnet"


class TestDechunkerOfScan(DechunkerTests):
    part = "hnet"
    chunker: ClassVar = {"name": "hnet", "scan": "hilbert"}


def test_all_three_names_are_announced():
    for kind in ("routers", "chunkers", "dechunkers"):
        assert "hnet" in adaptok.available(kind)
    assert adaptok.describe("hnet").entries[0].origin == "hnet"
