"""The checks that adaptok gives to every plug-in."""

from dataclasses import replace

import torch
from adaptok_cache import FirstBlockCache, TaylorSeer, TeaCache

from adaptok import Effects
from adaptok.testing import StageTests, check_stage

# The kit's hosts and calls have no diffusion step, and nobody says whose it is.
PRETEND = Effects("time", keeps_state=True)


def with_step(call):
    """Return a call with a step of a request, as a diffusion transformer gives it."""
    step = torch.full((call.x.shape[0],), 500.0, device=call.x.device)
    return replace(call, timestep=step, numbers=replace(call.numbers, request="kit"))


class Told:
    """A cache that is told the step which the kit does not have."""

    effects = PRETEND

    def forward(self, inner, call):
        after = super().forward(inner, with_step(call))
        return replace(after, timestep=call.timestep, numbers=call.numbers)


class ToldTea(Told, TeaCache):
    pass


class ToldFirst(Told, FirstBlockCache):
    pass


class ToldTaylor(Told, TaylorSeer):
    pass


class TestTeaCache(StageTests):
    part = ToldTea


class TestFirstBlock(StageTests):
    part = ToldFirst


class TestTaylorSeer(StageTests):
    part = ToldTaylor


def test_options_make_the_same_stage_again():
    wanted = (
        {"name": "teacache", "threshold": 0.5, "coefficients": (1.0, 0.0), "signal": "condition"},
        {"name": "firstblock", "threshold": 0.5, "warmup": 3, "agree": True},
        {"name": "taylorseer", "interval": 2, "order": 2, "steps": 30, "max_requests": 2},
    )
    for part in ("teacache", "firstblock", "taylorseer", *wanted):
        report = check_stage(part, only=["options"])
        report.raise_failed()
        assert report.passed == ("options",)
