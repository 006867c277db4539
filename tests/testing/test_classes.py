"""The classes for pytest run the same checks as the functions."""

import subprocess
import sys
import textwrap

import pytest

from adaptok import testing
from adaptok.errors import ConfigError
from adaptok.testing.backbone_checks import BACKBONE_CHECKS
from adaptok.testing.chunker_checks import CHUNKER_CHECKS
from adaptok.testing.dechunker_checks import DECHUNKER_CHECKS
from adaptok.testing.report import name_of, reason_of
from adaptok.testing.router_checks import ROUTER_CHECKS
from adaptok.testing.stage_checks import STAGE_CHECKS

KINDS = {
    testing.RouterTests: ROUTER_CHECKS,
    testing.ChunkerTests: CHUNKER_CHECKS,
    testing.DechunkerTests: DECHUNKER_CHECKS,
    testing.StageTests: STAGE_CHECKS,
    testing.BackboneTests: BACKBONE_CHECKS,
}


@pytest.mark.parametrize(("tests", "checks"), KINDS.items())
def test_each_check_is_one_test_with_its_reason(tests, checks):
    names = [name for name in vars(tests) if name.startswith("test_")]
    assert names == [f"test_{name_of(check)}" for check in checks]
    for check in checks:
        assert reason_of(check)
        assert len(reason_of(check)) <= 100
        assert getattr(tests, f"test_{name_of(check)}").__doc__ == f"{reason_of(check)}."


@pytest.mark.parametrize("tests", KINDS)
def test_a_class_without_a_part_says_what_it_needs(tests):
    with pytest.raises(ConfigError, match=r"CheckTests|Tests needs .*make\(self\)"):
        tests().case().title  # noqa: B018


def test_a_part_of_another_kind_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"a router is checked, and .* is none: give"):
        testing.check_router(testing.OwnFeatures)
    with pytest.raises(ConfigError, match="a router is a name, a mapping"):
        testing.check_router(3)


FILE = """
    import adaptok, pytest
    from adaptok.testing import RouterTests
    from torch import nn

    class Mine(adaptok.Router):
        compilable = False
        def __init__(self, width):
            super().__init__()
            self.score = nn.Linear(width, 1)
        def forward(self, tokens, context):
            return adaptok.Routing(self.score(tokens.x).squeeze(-1).sigmoid())

    class Broken(Mine):
        def forward(self, tokens, context):
            return adaptok.Routing(super().forward(tokens, context).keep_prob.detach())

    class TestMine(RouterTests):
        part = Mine

    class TestNarrow(RouterTests):
        width = 48
        skip = {"pickle": "not wanted"}
        def make(self):
            return Mine(48)

    class TestBroken(RouterTests):
        part = Broken
"""


def test_pytest_collects_runs_and_skips_them(tmp_path):
    (tmp_path / "test_mine.py").write_text(textwrap.dedent(FILE))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfs", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    out = done.stdout
    count = len(ROUTER_CHECKS)
    # not run: compile, starts_full and options of each, pickle of one
    assert f"1 failed, {3 * count - 11} passed, 10 skipped" in out, out
    assert "FAILED test_mine.py::TestBroken::test_gradient" in out
    assert "compilable = False" in out
    assert "not wanted" in out


def test_pytest_is_not_imported_with_the_kit():
    code = "import sys, adaptok.testing; print('pytest' in sys.modules, 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr
