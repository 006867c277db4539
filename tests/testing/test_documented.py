"""The page for authors names every check, and no other."""

import re
from pathlib import Path

import pytest

from adaptok.testing.backbone_checks import BACKBONE_CHECKS
from adaptok.testing.chunker_checks import CHUNKER_CHECKS
from adaptok.testing.dechunker_checks import DECHUNKER_CHECKS
from adaptok.testing.host_checks import HOST_CHECKS
from adaptok.testing.module_checks import MODULE_CHECKS
from adaptok.testing.router_checks import ROUTER_CHECKS
from adaptok.testing.stage_checks import STAGE_CHECKS
from adaptok.testing.wrapped_checks import WRAPPED_CHECKS

PAGE = Path(__file__).parents[2] / "docs" / "testing-your-plugin.md"
KINDS = {
    "Routers": ROUTER_CHECKS,
    "Chunkers": CHUNKER_CHECKS,
    "Dechunkers": DECHUNKER_CHECKS,
    "Stages": STAGE_CHECKS,
    "Backbones": BACKBONE_CHECKS,
}


def names(checks):
    return {check.__name__.removeprefix("check_") for check in checks}


def section(title):
    """Return the names in the table of a section."""
    text = PAGE.read_text(encoding="utf-8")
    (part,) = re.findall(rf"^### {title}.*?$(.*?)(?=^##)", text, re.DOTALL | re.MULTILINE)
    return set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE))


@pytest.mark.parametrize("kind", KINDS)
def test_each_check_of_a_kind_is_described(kind):
    common = names(MODULE_CHECKS) | names(HOST_CHECKS)
    own = names(KINDS[kind])
    found = section(kind)
    assert found <= own, found - own
    needed = own - (names(WRAPPED_CHECKS) - {"second_wrap"} if kind == "Backbones" else common)
    assert needed <= found, needed - found


def test_checks_of_all_kinds_are_described():
    assert section("All kinds") == names(MODULE_CHECKS) | names(HOST_CHECKS)
