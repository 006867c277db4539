"""For authors of plug-ins: the checks that a part should pass, and small hosts to try it on.

In a notebook `adaptok.testing.check_router(MyRouter)` prints a table; in a test file the same
checks are a class:

>>> class TestMine(RouterTests):
...     part = "norm"
"""

from adaptok.testing.backbone_checks import check_backbone
from adaptok.testing.chunker_checks import check_chunker
from adaptok.testing.classes import (
    BackboneTests,
    ChunkerTests,
    DechunkerTests,
    RouterTests,
    StageTests,
)
from adaptok.testing.dechunker_checks import check_dechunker
from adaptok.testing.models import fill_weights, make_vit
from adaptok.testing.partners import OwnFeatures
from adaptok.testing.report import ConformanceError, Report
from adaptok.testing.router_checks import check_router
from adaptok.testing.stage_checks import check_stage

__all__ = [
    "BackboneTests",
    "ChunkerTests",
    "ConformanceError",
    "DechunkerTests",
    "OwnFeatures",
    "Report",
    "RouterTests",
    "StageTests",
    "check_backbone",
    "check_chunker",
    "check_dechunker",
    "check_router",
    "check_stage",
    "fill_weights",
    "make_vit",
]
