"""The kit can fail: each check catches a part that is broken in just that way."""

import pytest
from testing import backbone_twins, chunker_twins, dechunker_twins, router_twins, stage_twins
from testing.twins import ALL
from timm.models.vision_transformer import Block

from adaptok.discovery import HOST
from adaptok.testing import (
    check_backbone,
    check_chunker,
    check_dechunker,
    check_router,
    check_stage,
)
from adaptok.testing.backbone_checks import BACKBONE_CHECKS
from adaptok.testing.chunker_checks import CHUNKER_CHECKS
from adaptok.testing.dechunker_checks import DECHUNKER_CHECKS
from adaptok.testing.report import name_of
from adaptok.testing.router_checks import ROUTER_CHECKS
from adaptok.testing.stage_checks import STAGE_CHECKS

KITS = {
    "router": (check_router, ROUTER_CHECKS, router_twins),
    "chunker": (check_chunker, CHUNKER_CHECKS, chunker_twins),
    "dechunker": (check_dechunker, DECHUNKER_CHECKS, dechunker_twins),
    "stage": (check_stage, STAGE_CHECKS, stage_twins),
    "backbone": (check_backbone, BACKBONE_CHECKS, backbone_twins),
}
CASES = [
    pytest.param(kind, name_of(check), id=f"{kind}-{name_of(check)}")
    for kind, (_, checks, _) in KITS.items()
    for check in checks
]
# left out where they are not what is looked for
SLOW = {"compile"}
SLOW_OF_STAGES = {"checkpointing", "budgets", "effects", "extremes", "gradient"}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Twins with names, which are forgotten again; timm as it was."""
    HOST.load_all()
    monkeypatch.setattr(HOST.registry, "entries", dict(HOST.registry.entries))
    monkeypatch.setattr(Block, "forward", Block.forward)
    for kind, (_, _, twins) in KITS.items():
        for name, part in getattr(twins, "NAMES", {}).items():
            HOST.registry.add(kind, name, part)


def run(kind, twin, check, names):
    function, _, twins = KITS[kind]
    slow = SLOW | SLOW_OF_STAGES if kind == "stage" else SLOW
    wanted = [name for name in names if name not in slow - {check, *twin.also}]
    given = twin.part if isinstance(twin.part, tuple) else (twin.part,)
    return function(*given, only=wanted, **getattr(twins, "OPTIONS", {}), **twin.options)


@pytest.mark.parametrize(("kind", "check"), CASES)
def test_a_check_catches_its_broken_twin_and_hardly_any_other_does(kind, check):
    _, checks, twins = KITS[kind]
    names = [name_of(function) for function in checks]
    assert check in twins.TWINS, f"the check {check!r} of a {kind} has no broken twin"
    twin = twins.TWINS[check]
    report = run(kind, twin, check, names)
    assert check in report.failed, report
    if twin.also is not ALL:
        assert set(report.failed) == {check, *twin.also}, report


@pytest.mark.parametrize("kind", KITS)
def test_there_are_no_twins_of_checks_that_do_not_exist(kind):
    _, checks, twins = KITS[kind]
    assert set(twins.TWINS) == {name_of(check) for check in checks}
    assert set(getattr(twins, "MORE", {})) <= set(twins.TWINS)


@pytest.mark.parametrize(
    ("kind", "check"),
    [(kind, check) for kind, (_, _, twins) in KITS.items() for check in getattr(twins, "MORE", {})],
)
def test_a_second_way_to_be_broken_is_caught_too(kind, check):
    report = run(kind, KITS[kind][2].MORE[check], check, [check])
    assert report.failed == (check,), report


@pytest.mark.parametrize(
    ("kind", "part"), [(kind, part) for kind, kit in KITS.items() for part in kit[2].GOOD]
)
def test_the_part_that_twins_are_made_from_passes(kind, part):
    given = part if isinstance(part, tuple) else (part,)
    report = KITS[kind][0](*given, **getattr(KITS[kind][2], "OPTIONS", {}))
    report.raise_failed()
    assert set(report.not_run) <= {"options", "starts_full", "gradient"}, report


def test_a_chunker_that_detaches_its_tokens_is_caught():
    report = check_chunker(chunker_twins.DetachedTokens, only=["gradient"])
    assert list(report.failed) == ["gradient"]
    assert "no gradient reaches the tokens" in str(report)
