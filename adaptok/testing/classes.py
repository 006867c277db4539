"""The checks as classes for pytest: one test per check, over the same lists as the functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import nn

from adaptok.errors import ConfigError
from adaptok.hosts import Backbone, HostInputs
from adaptok.testing.backbone_cases import BackboneCase
from adaptok.testing.backbone_checks import BACKBONE_CHECKS
from adaptok.testing.cases import PartCase, PartSpec
from adaptok.testing.chunker_checks import CHUNKER_CHECKS, ChunkerCase
from adaptok.testing.dechunker_checks import DECHUNKER_CHECKS, DechunkerCase
from adaptok.testing.models import WIDTH
from adaptok.testing.report import NotRun, name_of, reason_of
from adaptok.testing.router_checks import ROUTER_CHECKS, RouterCase
from adaptok.testing.stage_checks import STAGE_CHECKS, StageCase

Tests = TypeVar("Tests", bound=type["CheckTests"])


class CheckTests:
    """What the classes for pytest have in common.

    Args:
        skip: names of checks that are not run, and why.
    """

    skip: ClassVar[Mapping[str, str]] = {}

    def case(self) -> Any:  # noqa: ANN401
        """Return what is checked."""
        raise NotImplementedError


def add_tests(checks: Sequence[Callable[[Any], None]]) -> Callable[[Tests], Tests]:
    """Return a decorator that gives a class one test per check.

    Args:
        checks: the checks.

    Returns:
        The decorator.
    """

    def add(tests: Tests) -> Tests:
        for check in checks:
            setattr(tests, f"test_{name_of(check)}", make_test(check))
        return tests

    return add


def make_test(check: Callable[[Any], None]) -> Callable[[CheckTests], None]:
    """Return a method that runs a check, and skips it with its reason where it does not apply."""

    def test(self: CheckTests) -> None:
        import pytest  # only where tests run: not a dependency of adaptok

        reason = self.skip.get(name_of(check))
        if reason is None:
            try:
                check(self.case())
            except NotRun as inapplicable:
                reason = str(inapplicable)
        if reason is not None:
            pytest.skip(reason)

    test.__name__ = f"test_{name_of(check)}"
    test.__doc__ = f"{reason_of(check)}."
    return test


class PartTests(CheckTests):
    """Tests of a part of a model: set `part`, or override `make`.

    Args:
        part: a registered name, a mapping with options, or a class.
        width: features of a token, where `make` returns weights of another width.
    """

    part: ClassVar[PartSpec | None] = None
    width: ClassVar[int] = WIDTH

    def make(self) -> nn.Module:
        """Return a fresh part."""
        raise ConfigError(f"{type(self).__name__} needs `part = ...`, or a method `make(self)`")

    def wanted(self) -> PartSpec:
        """Return what the checks make parts from."""
        return self.make if self.part is None else self.part


@add_tests(ROUTER_CHECKS)
class RouterTests(PartTests):
    """Tests of a router.

    Example:
        >>> class TestNorm(RouterTests):
        ...     part = "norm"
        >>> TestNorm().test_range()
    """

    def case(self) -> PartCase:
        """Return the router that is checked."""
        return RouterCase(self.wanted(), self.width)


@add_tests(CHUNKER_CHECKS)
class ChunkerTests(PartTests):
    """Tests of a chunker; `router` and `dechunker` as in `check_chunker`.

    Example:
        >>> class TestFixed(ChunkerTests):
        ...     part = {"name": "dc", "layout": "fixed"}
        >>> TestFixed().test_budgets()
    """

    router: ClassVar[PartSpec | None] = None
    dechunker: ClassVar[PartSpec | None] = None

    def case(self) -> PartCase:
        """Return the chunker that is checked."""
        return ChunkerCase(self.wanted(), self.width, self.router, self.dechunker)


@add_tests(DECHUNKER_CHECKS)
class DechunkerTests(PartTests):
    """Tests of a dechunker; `chunker` as in `check_dechunker`.

    Example:
        >>> class TestMine(DechunkerTests):
        ...     part = "dc"
        >>> TestMine().test_round_trip()
    """

    chunker: ClassVar[PartSpec | None] = None

    def case(self) -> PartCase:
        """Return the dechunker that is checked."""
        return DechunkerCase(self.wanted(), self.width, self.chunker)


@add_tests(STAGE_CHECKS)
class StageTests(PartTests):
    """Tests of a stage.

    Example:
        >>> import adaptok
        >>> class TestNothing(StageTests):
        ...     def make(self):
        ...         class Nothing(adaptok.Stage):
        ...             effects = adaptok.Effects("depth")
        ...             def forward(self, inner, call):
        ...                 return inner(call)
        ...         return Nothing()
        >>> TestNothing().test_count()
    """

    def case(self) -> PartCase:
        """Return the stage that is checked."""
        return StageCase(self.wanted(), self.width)


@add_tests(BACKBONE_CHECKS)
class BackboneTests(CheckTests):
    """Tests of a backbone: set `backbone`, and override `make` to return a small host.

    Args:
        backbone: a registered name, a class, or an instance.

    Example:
        >>> from adaptok.testing import make_vit
        >>> class TestTimm(BackboneTests):
        ...     backbone = "timm-vit"
        ...     def make(self):
        ...         return make_vit()
        >>> TestTimm().test_cells()
    """

    backbone: ClassVar[str | Backbone | type[Backbone]] = "auto"

    def make(self) -> nn.Module:
        """Return a small host, always alike."""
        raise ConfigError(f"{type(self).__name__} needs a method `make(self)` that returns a host")

    def inputs(self, model: nn.Module) -> HostInputs | None:
        """Return what a host is called with; None takes the backbone's own example."""
        return None

    def refused(self) -> Mapping[str, Callable[[nn.Module], object]]:
        """Return options that must be refused, in words, each with a function of the host."""
        return {}

    def case(self) -> BackboneCase:
        """Return the backbone that is checked."""
        return BackboneCase(self.backbone, self.make, self.inputs, self.refused())
