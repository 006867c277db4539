"""The checks that adaptok gives to every plug-in."""

from typing import ClassVar

import adaptok
from adaptok.testing import ChunkerTests, DechunkerTests, RouterTests


class TestRouter(RouterTests):
    part = "graph"


class TestAttention(RouterTests):
    part: ClassVar = {"name": "graph", "kind": "gat", "neighbours": 8, "layers": 1, "prior": None}


class TestBucketed(ChunkerTests):
    part = "graph"


class TestFixedMeans(ChunkerTests):
    part: ClassVar = {"name": "graph", "layout": "fixed", "token": "mean", "trust": 0.0}


class TestPacked(ChunkerTests):
    part: ClassVar = {"name": "graph", "layout": "packed", "token": "mean", "neighbours": 8}


class TestThreshold(ChunkerTests):
    part: ClassVar = {"name": "graph", "threshold": 0.5}
    skip: ClassVar = {"budgets": "the threshold replaces the router's natural count"}


class TestMembersForAnyDechunker(ChunkerTests):
    part = "graph"
    dechunker = "dc"


class TestDechunker(DechunkerTests):
    part = "graph"


class TestDechunkerOfSegments(DechunkerTests):
    part: ClassVar = {"name": "graph", "neighbours": 8}
    chunker: ClassVar = {"name": "graph", "token": "mean"}


def test_all_three_names_are_announced():
    for kind in ("routers", "chunkers", "dechunkers"):
        assert "graph" in adaptok.available(kind)
    assert adaptok.describe("graph").entries[0].origin == "graph"
