"""A failing check says what was really seen: one broken part for each cause."""

import random

import pytest
import torch
from testing.chunker_twins import NoWayBack
from testing.dechunker_twins import GoodDechunker, ZerosElsewhere
from testing.router_twins import GoodRouter, MixesSamples, SeedsEverybody
from torch import nn

from adaptok.errors import ConfigError, UnknownNameError
from adaptok.testing import (
    RouterTests,
    check_backbone,
    check_chunker,
    check_dechunker,
    check_router,
    check_stage,
    make_vit,
)


def note_of(report, check):
    (note,) = (result.note for result in report.results if result.check == check)
    return note


@pytest.mark.parametrize(
    ("check", "kind"),
    [
        (check_router, "router"),
        (check_chunker, "chunker"),
        (check_dechunker, "dechunker"),
        (check_stage, "stage"),
    ],
)
def test_a_name_that_is_wrong_is_one_error(check, kind):
    with pytest.raises(UnknownNameError, match=f"^there is no {kind} 'typo': known are "):
        check("typo")
    with pytest.raises(ConfigError, match="typo: this option does not exist"):
        check({"name": "tome" if kind == "stage" else "dc", "typo": 1})


def test_wrong_names_of_partners_and_backbones_and_in_classes_are_one_error():
    for options in ({"router": "typo"}, {"dechunker": "typo"}):
        with pytest.raises(UnknownNameError, match=r"^there is no (router|dechunker) 'typo'"):
            check_chunker("dc", **options)
    with pytest.raises(UnknownNameError, match=r"^there is no chunker 'typo'"):
        check_dechunker("dc", chunker="typo")
    with pytest.raises(UnknownNameError, match=r"^there is no backbone 'typo'"):
        check_backbone("typo", make_vit)

    class Typo(RouterTests):
        part = "typo"

    with pytest.raises(UnknownNameError, match=r"^there is no router 'typo'"):
        Typo().test_range()


class Draws(GoodRouter):
    def judge(self, x):
        return super().judge(x) + torch.randn(x.shape[:2])


class DrawsElsewhere(GoodRouter):
    def judge(self, x):
        return super().judge(x) + random.random()


class CountsCalls(GoodRouter):
    calls = 0

    def judge(self, x):
        self.calls += 1
        return super().judge(x) + 0.1 * self.calls


class CountsPairs(GoodRouter):
    """The second call is as the first one, the third one is not."""

    calls = 0

    def judge(self, x):
        self.calls += 1
        return super().judge(x) + 0.1 * ((self.calls + 1) // 2)


class NoCopy(nn.Module):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


class CountsAndHasNoCopy(NoCopy, CountsCalls):
    pass


class DrawsAndHasNoCopy(NoCopy, Draws):
    pass


class CountsAndMixes(CountsCalls, MixesSamples):
    pass


class NotANumber(GoodRouter):
    def judge(self, x):
        return super().judge(x) * torch.nan


DRAWS = "it draws new random numbers in each call"


@pytest.mark.parametrize(
    ("part", "variation", "seed", "batch"),
    [
        (GoodRouter, "none", None, None),
        (Draws, "seeded", None, DRAWS),
        (DrawsAndHasNoCopy, "seeded", None, DRAWS),
        (CountsCalls, "state", "it keeps something from call to call. Let the", None),
        (CountsPairs, "state", "it keeps something from call to call. Let the", None),
        (CountsAndMixes, "state", "keeps something", "sample 0 has another answer beside others"),
        (DrawsElsewhere, "elsewhere", "does not reach (random, numpy", "check `seed` says why"),
        (CountsAndHasNoCopy, "unknown", "cannot be copied to see why", "check `seed` says why"),
        (SeedsEverybody, "none", "use a torch.Generator of its own", None),
        (NotANumber, "none", None, "the answer holds what is no finite number"),
    ],
)
def test_why_an_answer_changes(part, variation, seed, batch):
    # an instance: copies of it are checked
    report = check_router(part(96), only=["seed", "batch"])
    assert ("seed" in report.failed) == (seed is not None), report
    assert (seed or "The same seed gives the same answer") in note_of(report, "seed")
    assert (batch or "A sample's answer is the same alone") in note_of(report, "batch")
    assert ("batch" in report.passed) == (batch is None), report
    assert ("batch" in report.not_run) == (variation in ("seeded", "elsewhere", "unknown")), report


def test_an_answer_that_is_not_a_number_is_no_other_fault():
    """NaN is not equal to itself: no check may take it for another weight or another seed."""
    report = check_router(NotANumber, only=["range", "seed", "pickle", "state_dict", "compile"])
    assert report.passed == ("seed", "pickle", "state_dict"), report
    assert "a probability is no finite number" in note_of(report, "range")
    assert "the answer holds what is no finite number" in note_of(report, "compile")


class KeptToo(GoodDechunker):
    restores = "kept"

    def rest(self, x, chunks, plan, before):
        return 1.5 * x


class HalfOfEach(GoodDechunker):
    restores = "kept"

    def rest(self, x, chunks, plan, before):
        return torch.where(plan.keep_mask[..., None], x, 0.5 * x)


class FewerCells(GoodDechunker):
    def forward(self, chunks, plan, before):
        return chunks


def test_a_round_trip_says_which_cells_came_back_otherwise_and_what_to_do():
    note = note_of(check_dechunker(ZerosElsewhere, only=["round_trip"]), "round_trip")
    assert note.startswith(
        "with keep=0.5, dense tokens: the blocks changed nothing, and 0 of 36 kept and 36 of 36 "
        "dropped cells came back with other features than they had, by up to 0.97 of the largest "
        "one (1e-05 is allowed). With restores = 'all', every cell comes back: add only what"
    ), note
    assert 'restores = "kept" on the dechunker, if dropped cells cannot, "nothing"' in note
    note = note_of(check_dechunker(KeptToo, only=["round_trip"]), "round_trip")
    assert "36 of 36 kept and 36 of 36 dropped cells came back" in note
    assert "by up to 0.5 of the largest one" in note
    assert "With restores = 'kept', every kept cell comes back" in note
    assert 'cannot do even that says restores = "nothing"' in note
    assert check_dechunker(HalfOfEach, only=["round_trip"]).passed == ("round_trip",)
    note = note_of(check_dechunker(FewerCells, only=["round_trip"]), "round_trip")
    assert "cells of the shape (3, 24, 96) went in, (3, 12, 96) came back" in note


def test_a_round_trip_of_a_chunker_names_its_dechunker():
    report = check_chunker(NoWayBack, only=["round_trip"])
    assert "the blocks changed nothing" in note_of(report, "round_trip")
    assert "the dechunker OwnFeatures: the blocks" in note_of(report, "round_trip")
