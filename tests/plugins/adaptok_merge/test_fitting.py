"""What ToMe takes from data: shares on images that were held out, and numbers for each block."""

import copy
import math

import pytest
import torch
from adaptok_merge import fitting
from adaptok_merge.rates import count_left
from adaptok_merge.tome import ToMe
from hypothesis import given
from hypothesis import strategies as st

import adaptok
from adaptok.calibrated import CalibrationRecord
from adaptok.calibrating import calibrate
from adaptok.errors import ConfigError, DataError
from adaptok.testing import make_vit


def draw_images(seed, count=24, spread=1.0):
    """Images of which some are smoother than others, so that samples keep different counts."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(count, 3, 32, 48, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(rough, 9, 1, 4) * 3
    share = 0.5 + spread * (torch.rand(count, 1, 1, 1, generator=generator) - 0.5)
    return share * rough + (1 - share) * smooth


def wrap_tome(**options):
    return adaptok.wrap(make_vit(), stack=[{"name": "tome", **options}])


def measure_kept(model, images):
    with torch.no_grad(), adaptok.trace(model) as seen:
        model(images)
    return seen.steps[0].kept.double() / math.prod(seen.steps[0].grid)


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("site", ["between", "boundary"])
def test_a_threshold_leaves_the_wanted_share_of_images_that_it_never_saw(keep, site):
    model = wrap_tome(r=3, site=site)
    images = draw_images(0, 96, spread=0.2)
    profile = calibrate(model, images.split(24), wanted={"tome": {"keep": keep}})
    figures = profile.stages["tome"].figures
    assert (figures["fitted_on"], figures["held_out"]) == (48, 48)
    assert figures["kept"] == pytest.approx(keep, abs=1e-3)
    profile.apply(model)
    assert model.blocks.adaptok["tome"].given_r is None
    shares = measure_kept(model, draw_images(7, 96, spread=0.2))
    assert shares.unique().numel() > 2, "samples should keep different counts"
    # means over 48 and 96 samples are three standard errors apart at most; a count jumps by a cell
    error = 3 * float(shares.std()) * math.sqrt(1 / 48 + 1 / 96) + 1 / 48
    assert float(shares.mean()) == pytest.approx(keep, abs=error)
    assert error < 0.12
    # what the profile says of those held out is read off lines between the tried thresholds
    held = float(measure_kept(model, torch.cat(images.split(24)[1::2])).mean())
    assert figures["kept_held_out"] == pytest.approx(held, abs=0.01)


def test_the_budget_that_is_set_does_not_matter_and_stays():
    model = wrap_tome(r=3)
    expected = calibrate(model, draw_images(0).split(12), wanted={"tome": {"keep": 0.6}})
    adaptok.set_budget(model, keep=0.9)
    before = measure_kept(model, draw_images(1))
    found = calibrate(model, draw_images(0).split(12), wanted={"tome": {"keep": 0.6}})
    assert found.stages == expected.stages
    assert torch.equal(measure_kept(model, draw_images(1)), before)
    assert model.blocks.adaptok["tome"].r == 3


def test_numbers_follow_where_pairs_are_alike():
    rows = {}
    for batch in range(2):
        for sample in range(2):
            rows[batch, sample] = {
                "cells": (24.0,),
                "block0": (0.9,) * 2 + (0.1,) * 10,
                "block1": (0.95,) * 6 + (0.2,) * 4,
                "block2": (0.8,) * 1 + (0.3,) * 7,
            }
    chosen, held_out = CalibrationRecord(rows).split(0.5)
    fitted = ToMe.fit_settings(chosen, held_out, {"fit": "r", "keep": None, "rates": 3})
    assert fitted.settings == {"threshold": None, "r": [2, 6, 1]}
    assert fitted.figures["cosine"] == 0.8
    assert fitted.figures["above_held_out"] == 9
    assert fitted.figures["alike_held_out"] == pytest.approx((2 * 0.9 + 6 * 0.95 + 0.8) / 9)
    even = (2 * 0.9 + 0.1 + 3 * 0.95 + 0.8 + 2 * 0.3) / 9
    assert fitted.figures["alike_before"] == pytest.approx(even)


def test_a_fitted_list_leaves_as_many_and_merges_what_is_more_alike():
    model = wrap_tome(r=3)
    images = draw_images(0)
    before = measure_kept(model, images)
    profile = calibrate(model, images.split(6))
    r = profile.stages["tome"].settings["r"]
    figures = profile.stages["tome"].figures
    assert sum(r) == 9
    assert len(set(r)) > 1
    assert figures["alike_held_out"] > figures["alike_before"]
    profile.apply(model)
    assert torch.equal(measure_kept(model, images), before)
    assert model.blocks.adaptok["tome"].r == r


def test_cosines_are_those_of_the_features_in_front_of_the_block():
    model = wrap_tome(r=3, site="boundary")
    images = draw_images(2, count=3)
    record = calibrate(model, [images])._records["tome"]
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))[:, 1:]
    for sample in range(3):
        cosines = []
        for a in range(1, 24, 2):  # rows 2, 4 ... of the sequence, behind the class token
            unit = [x[sample, b] / x[sample, b].norm() for b in range(0, 24, 2)]
            cosines.append(max(float(u @ (x[sample, a] / x[sample, a].norm())) for u in unit))
        row = record.rows[0, sample]
        assert row["cells"] == (24.0,)
        assert row["block0"] == pytest.approx(cosines, abs=1e-5)
        assert [len(row[f"block{i}"]) for i in range(3)] == [12, 10, 9]


@given(
    n=st.integers(2, 200),
    weights=st.lists(st.floats(0, 100), min_size=1, max_size=12),
    share=st.floats(0, 1),
)
def test_numbers_can_be_merged_and_sum_up(n, weights, share):
    most = n - count_left((n,) * len(weights), n)
    total = int(share * most)
    try:
        rates = fitting.share_out(n, total, weights)
    except DataError:
        # only near the most that can merge, where each block must halve
        assert total > most // 2
        return
    assert sum(rates) == total
    assert fitting.fits(n, rates)
    assert count_left(rates, n) == n - total


def test_bad_wishes_are_refused_and_nothing_changes():
    model = wrap_tome(threshold=0.7)
    stage = model.blocks.adaptok["tome"]
    state = copy.copy(stage.read_settings())
    images = draw_images(0, count=8)
    assert calibrate(model, images.split(4)).unfit == ("tome",)
    for wish, message in (
        ({"keep": 1.5}, "keep is a share in \\(0, 1\\), got 1.5"),
        ({"fit": "q"}, "fit of 'tome' is 'threshold' or 'r', got 'q'"),
        ({"fit": "threshold"}, "give keep=, too"),
        ({"share": 1}, "can be asked for fit, keep, got 'share'"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrate(model, images.split(4), wanted={"tome": wish})
    with pytest.raises(DataError, match="even where everything merges that can, and keep"):
        calibrate(model, images.split(4), wanted={"tome": {"keep": 0.05}})
    with pytest.raises(DataError, match="of 24 tokens are to merge, and 3 blocks"):
        calibrate(model, images.split(4), wanted={"tome": {"fit": "r", "keep": 0.05}})
    images[5, 1, 2, 3] = float("inf")
    with pytest.raises(DataError, match="batch 1 holds NaN or infinity"):
        calibrate(model, images.split(4), wanted={"tome": {"keep": 0.5}})
    assert stage.read_settings() == state
    assert stage.watching is None
    assert stage.budget_setting.is_natural


def test_shares_that_no_threshold_leaves_are_refused():
    wanted = {"fit": "threshold", "keep": 0.7, "rates": 3}
    for kept, message in (
        ((0.2, 0.3, 0.4), r"leaves 0.400 of the cells even if it merges only tokens that are"),
        ((0.2, 0.3, 1.0), r"leaves 0.3\d+ of the cells just below a cosine of .*fit': 'r'"),
    ):
        row = {"threshold": (-1.0, math.cos(2e-4), 1.0), "kept": kept}
        chosen, held_out = CalibrationRecord({(b, 0): row for b in range(4)}).split(0.5)
        with pytest.raises(DataError, match=message):
            ToMe.fit_settings(chosen, held_out, wanted)
    blank = torch.zeros(4, 3, 32, 48)
    model = wrap_tome(r=3)
    with torch.no_grad():
        model.pos_embed.zero_()  # all cells are alike up to rounding
    with pytest.raises(DataError, match=r"no threshold leaves|even if it merges only tokens"):
        calibrate(model, [blank, blank], wanted={"tome": {"keep": 0.7}})
