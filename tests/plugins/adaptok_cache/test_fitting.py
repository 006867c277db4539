"""The polynomial from data: a known relation, real walks, and whose steps are compared."""

import copy

import pytest
import torch
from adaptok_cache import TeaCache
from adaptok_cache.distances import relative_change
from adaptok_cache.fitting import explain_variance, fit_polynomial
from adaptok_cache.teacache import evaluate_polynomial

import adaptok
from adaptok.calibrated import CalibrationRecord
from adaptok.calibrating import calibrate
from adaptok.errors import ConfigError, DataError, ProfileError


def walk_over(walk, request=None):
    """A function that runs a whole walk."""

    def run(model):
        if request is None:
            return [model(*step) for step in walk.steps]
        with adaptok.request(model, request):
            return [model(*step) for step in walk.steps]

    return run


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_a_known_relation_is_recovered_through_records(degree):
    known = (-3.0, 2.0, 0.5, 1.5, 0.01)[4 - degree :]
    generator = torch.Generator().manual_seed(degree)
    rows = {}
    for batch in range(4):
        for sample in range(3):
            x = torch.rand(7, generator=generator, dtype=torch.float64) * 0.4
            y = [evaluate_polynomial(known, float(v)) for v in x]
            rows[batch, sample] = {"input": tuple(x.tolist()), "output": tuple(y)}
    chosen, held_out = CalibrationRecord(rows).split(0.5)
    fitted = TeaCache.fit_settings(chosen, held_out, {"degree": degree, "signal": "input"})
    expected = [0.0] * (4 - degree) + list(known)
    assert fitted.settings["coefficients"] == pytest.approx(expected, abs=1e-6)
    assert fitted.figures["r2"] > 1 - 1e-9
    assert fitted.figures["r2_held_out"] > 1 - 1e-9
    assert fitted.figures["pairs"] == fitted.figures["pairs_held_out"] == 42


def test_noise_costs_r2_and_a_constant_explains_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, generator=generator, dtype=torch.float64)
    y = 1 + 2 * x + 0.5 * torch.randn(400, generator=generator, dtype=torch.float64)
    found = fit_polynomial(x, y, 1)
    assert found == pytest.approx([0, 0, 0, 2, 1], abs=0.2)
    # the line explains var(2 x) = 1/3 of var(y) = 1/3 + 1/4
    assert explain_variance(found, x, y) == pytest.approx(4 / 7, abs=0.08)
    assert explain_variance((float(y.mean()),), x, y) == pytest.approx(0.0, abs=1e-9)
    assert explain_variance((1.0, 0.0), x, torch.ones_like(x)) is None
    assert explain_variance((1.0, 0.0), x[:0], y[:0]) is None


@pytest.mark.parametrize("request_name", [None, "one"])
@pytest.mark.parametrize("signal", ["input", "condition"])
def test_pairs_are_those_of_a_loop_over_the_plain_model(wrapped, dit, tools, request_name, signal):
    walks = [tools.Walk(seed=seed) for seed in (0, 1)]
    model = wrapped(TeaCache(10.0, signal=signal))
    profile = calibrate(
        model, [walk_over(w, request_name) for w in walks], wanted={"teacache": {"degree": 2}}
    )
    record = profile._records["teacache"]
    assert list(record.rows) == [(b, s) for b in range(2) for s in range(3)]
    for number, walk in enumerate(walks):
        for sample in range(walk.b):
            inputs, outputs = [], []
            last = None
            for x, t, y in walk.sample(sample):
                with torch.no_grad():
                    tokens = dit.x_embedder(x).flatten(2).transpose(1, 2) + dit.pos_embed
                    condition = dit.t_embedder(t) + dit.y_embedder(y)
                    z = tokens
                    for block in dit.blocks:
                        z = block(z, condition)
                seen = tokens if signal == "input" else condition
                if last is not None:
                    inputs += relative_change(seen, last[0])
                    outputs += relative_change(z, last[1])
                last = seen, z
            row = record.rows[number, sample]
            assert row["input"] == pytest.approx(inputs, rel=1e-4)
            assert row["output"] == pytest.approx(outputs, rel=1e-4)


def test_a_fit_predicts_better_than_the_identity_and_leaves_the_model(wrapped, tools):
    stage = TeaCache(0.1)
    model = wrapped(stage)
    walks = [tools.Walk(seed=seed) for seed in range(4)]
    for walk in walks:  # the step hardly moves, so that the input says how far the output moves
        noise, far = walk.steps[0][0], walk.steps[-1][0]
        paces = torch.tensor([0.0, 0.1, 0.15, 0.4, 0.45, 0.7, 0.73, 1.0, 1.02])
        walk.steps = [
            (noise + 2 * pace * far, torch.full((walk.b,), 900.0 - 0.01 * i), walk.labels)
            for i, pace in enumerate(paces)
        ]
    tools.run_steps(model, walks[0].steps[:3])
    kept, counts = copy.copy(stage.book.requests), (stage.computed, stage.reused)
    rng = torch.get_rng_state()
    profile = calibrate(model, [walk_over(w, "one") for w in walks], sampler="ddim", steps=9)
    assert torch.equal(torch.get_rng_state(), rng)
    assert stage.book.requests == kept
    assert (stage.computed, stage.reused) == counts
    assert stage.log is None
    assert stage.coefficients == (0.0, 0.0, 0.0, 1.0, 0.0)
    figures = profile.stages["teacache"].figures
    assert figures["fitted_on"] == figures["held_out"] == 6
    assert figures["pairs"] == 6 * 8
    assert figures["r2_held_out"] > max(0.5, figures["r2_identity"])
    profile.apply(model, grid=(4, 6), sampler="ddim", steps=9)
    assert list(stage.coefficients) == profile.stages["teacache"].settings["coefficients"]
    assert not stage.book.requests


def test_two_branches_of_one_walk_are_not_compared_with_each_other(wrapped, tools):
    walk, other = tools.Walk(seed=0), tools.Walk(seed=5)

    def run(model):
        for one, two in zip(walk.steps, other.steps, strict=True):
            for branch, step in (("cond", one), ("uncond", two)):
                with adaptok.request(model, "one", branch=branch):
                    model(*step)

    model = wrapped(TeaCache())
    record = calibrate(model, [run])._records["teacache"]
    alone = [calibrate(model, [walk_over(w, "one")])._records["teacache"] for w in (walk, other)]
    expected = [row for found in alone for row in found.rows.values()]
    assert list(record.rows.values()) == expected


def test_bad_input_leaves_the_model_as_it_was(wrapped, tools):
    stage = TeaCache()
    model = wrapped(stage)
    good = tools.Walk()
    bad = tools.Walk(seed=1)
    bad.steps[4][0][1, 2, 3, 4] = float("nan")
    with pytest.raises(DataError, match="batch 1 brings NaN or infinity into the blocks"):
        calibrate(model, [walk_over(good), walk_over(bad)])
    with pytest.raises(DataError, match="compares successive steps, and this batch has none"):
        calibrate(model, [good.steps[0]])
    with pytest.raises(DataError, match=r"moved by \d+ different distances"):
        calibrate(model, [walk_over(tools.Walk(b=2, times=tools.TIMES[:2]))])
    with pytest.raises(ConfigError, match="degree of 'teacache' is 1 to 4, got 5"):
        calibrate(model, [], wanted={"teacache": {"degree": 5}})
    with pytest.raises(ConfigError, match="can be asked for degree, got 'keep'"):
        calibrate(model, [], wanted={"teacache": {"keep": 0.5}})
    assert stage.log is None
    assert not stage.aside
    assert stage.coefficients == (0.0, 0.0, 0.0, 1.0, 0.0)
    assert not model.blocks.observers


def test_a_polynomial_of_another_signal_or_sampler_is_refused(wrapped, tools):
    walks = [walk_over(tools.Walk(seed=seed)) for seed in (0, 1)]
    profile = calibrate(wrapped(TeaCache()), walks, sampler="ddim", steps=9)
    model = wrapped(TeaCache(signal="condition"))
    with pytest.raises(ProfileError, match="fitted to signal='input'"):
        profile.apply(model)
    stage = TeaCache()
    model = wrapped(stage)
    with pytest.raises(ProfileError, match="made with 'ddim' as the sampler, and 'euler' is"):
        profile.apply(model, sampler="euler")
    with pytest.raises(ProfileError, match="made with 9 as the number of steps, and 50 is"):
        profile.apply(model, sampler="ddim", steps=50)
    assert stage.coefficients == (0.0, 0.0, 0.0, 1.0, 0.0)
