"""The checks that adaptok gives to every plug-in."""

from typing import ClassVar

import adaptok
from adaptok.testing import StageTests


class TestToMe(StageTests):
    part = "tome"


class TestToMeBySchedule(StageTests):
    part: ClassVar = {"name": "tome", "r": [3, 0.5], "proportional": False, "restore": "update"}


class TestToMeInFrontOfBlocks(StageTests):
    part: ClassVar = {"name": "tome", "r": 2, "site": "boundary"}


class TestToMeByThreshold(StageTests):
    part: ClassVar = {"name": "tome", "threshold": 0.7, "multiple": 2}


class TestToMeSD(StageTests):
    part = "tomesd"


class TestToMeSDInCorners(StageTests):
    part: ClassVar = {"name": "tomesd", "ratio": 0.3, "sx": 3, "use_rand": False}


def test_the_names_are_announced():
    assert {"tome", "tomesd"} <= set(adaptok.available("stages"))
    assert adaptok.describe("tome").entries[0].origin == "merge"
