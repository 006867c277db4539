"""Drawing images: distributions that are known, batches, guidance, traces, bad input."""

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from adaptok.diffusion import (
    FlowObjective,
    HybridObjective,
    combine_halves,
    denoise,
    sample,
)
from adaptok.errors import (
    AdaptokError,
    BudgetError,
    ConfigError,
    DeviceError,
    DtypeError,
    LabelError,
    ShapeError,
)

MEANS, STD = [0.7, -0.4, 0.1], 0.5


def statistics(model, objective, scheduler, steps, labels=(0, 1, 2, 1)):
    samples = sample(
        model, labels, objective=objective, scheduler=scheduler, steps=steps, shape=(2, 48, 40)
    )
    return [(values.mean().item(), values.std().item()) for values in samples.latents]


@pytest.mark.parametrize(
    ("name", "steps"), [("ddpm", 6), ("ddpm", 50), ("dpm", 20), ("flow-euler", 100)]
)
def test_a_known_distribution_is_recovered(name, steps, classes, linspace_steps):
    objective = FlowObjective() if name == "flow-euler" else HybridObjective()
    model = classes.Gaussian(objective, MEANS, STD, linspace_steps(steps))
    found = statistics(model, objective, name, steps)
    error = STD / math.sqrt(2 * 48 * 40)  # one standard error of a mean; 3,840 values
    for (mean, std), label in zip(found, (0, 1, 2, 1), strict=True):
        assert mean == pytest.approx(MEANS[label], abs=4 * error + 0.005)
        assert std == pytest.approx(STD, abs=4 * error / math.sqrt(2) + 0.005)


def test_the_learned_variance_is_used(classes, linspace_steps):
    """The failing twins of the test above: both ends of the learned range miss the data."""
    objective, steps = HybridObjective(), 6
    for place, wrong in ((-1.0, "narrow"), (1.0, "wide")):
        model = classes.Gaussian(objective, MEANS, STD, linspace_steps(steps), place)
        for _, std in statistics(model, objective, "ddpm", steps):
            assert (std < STD - 0.02) if wrong == "narrow" else (std > STD + 0.02)


def test_an_image_does_not_depend_on_its_batch(model, objective, scheduler):
    options = {"objective": objective, "scheduler": scheduler, "steps": 7}
    together = sample(model, [4, 0, 9], seed=11, **options)
    assert together.seeds == (11, 12, 13)
    for i, label in enumerate([4, 0, 9]):
        alone = sample(model, [label], seed=11 + i, **options)
        assert torch.equal(alone.initial[0], together.initial[i])
        torch.testing.assert_close(alone.latents[0], together.latents[i], rtol=1e-4, atol=1e-4)
    picked = sample(model, [9, 4], seed=(13, 11), **options)
    torch.testing.assert_close(picked.latents, together.latents[[2, 0]], rtol=1e-4, atol=1e-4)
    assert (together.latents[0] - together.latents[1]).abs().max() > 0.1


def test_seed_and_label_change_the_image(model, objective, scheduler):
    options = {"objective": objective, "scheduler": scheduler, "steps": 5}
    first = sample(model, [1], seed=0, **options).latents
    assert torch.equal(first, sample(model, torch.tensor([1]), seed=0, **options).latents)
    for other in (sample(model, [1], seed=1, **options), sample(model, [2], seed=0, **options)):
        assert (first - other.latents).abs().max() > 0.01


def test_ddpm_is_the_ancestral_walk(classes):
    """Against a loop in float64 that draws each image's noise from its own source."""
    model = classes.StandIn(out_channels=6).eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    samples = sample(
        model, [3, 7], objective=HybridObjective(), steps=4, seed=(4, 9), guidance_scale=1.5,
        guided_channels=3, drop=0.1, uncond_drop=0.8,
    )  # fmt: skip
    assert torch.equal(before, torch.get_rng_state()), "the global source was used"
    bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    sources = [torch.Generator().manual_seed(seed) for seed in (4, 9)]

    def draw():
        return torch.stack([torch.randn(3, 5, 7, generator=source) for source in sources]).double()

    x = draw()
    for t, following in pairwise([999, 666, 333, 0, None]):
        with torch.no_grad():
            pair = [
                model(x.float(), torch.full((2,), float(t)), torch.tensor(y), drop=drop).double()
                for y, drop in (([3, 7], 0.1), ([10, 10], 0.8))
            ]
        epsilon, place = combine_halves(torch.cat(pair), 1.5, 3)[:2].chunk(2, dim=1)
        before = bar[following] if t else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - bar[t] / before
        mean = (x - beta / (1 - bar[t]).sqrt() * epsilon) / (1 - beta).sqrt()
        low, high = ((1 - before) / (1 - bar[t]) * beta).log(), beta.log()
        std = (0.5 * ((place + 1) / 2 * high + (1 - place) / 2 * low)).exp()
        x = mean + std * draw() if t else mean
    torch.testing.assert_close(samples.latents.double(), x, rtol=1e-3, atol=1e-3)


def test_flow_euler_is_eulers_method(classes):
    model = classes.StandIn(out_channels=3).eval()
    objective = FlowObjective(shift=2.0)
    samples = sample(
        model, [3, 7], objective=objective, scheduler="flow-euler", steps=5, seed=4,
        guidance_scale=2.5, guided_channels=2, drop=0.1, uncond_drop=0.8,
    )  # fmt: skip
    x = torch.stack(
        [torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(s)) for s in (4, 5)]
    )
    levels = [2 * s / (1 + s) for s in (1.0, 0.8, 0.6, 0.4, 0.2)] + [0.0]
    with torch.no_grad():
        for now, following in pairwise(levels):
            t = torch.full((2,), 1000 * now)
            cond = model(x, t, torch.tensor([3, 7]), drop=0.1)
            uncond = model(x, t, torch.tensor([10, 10]), drop=0.8)
            guided = combine_halves(torch.cat([cond, uncond]), 2.5, 2)[:2]
            x = x + (following - now) * guided
    torch.testing.assert_close(samples.latents, x, rtol=1e-4, atol=1e-4)


def test_levels_of_the_schedulers(classes):
    model = classes.StandIn().eval()
    sample(model, [0], objective=HybridObjective(), steps=250)
    times = [call.t.item() for call in model.calls]
    assert len(times) == 250
    assert (times[0], times[-1]) == (999, 0)
    assert {a - b for a, b in pairwise(times)} == {4, 5}
    model.calls.clear()
    sample(model, [0], objective=HybridObjective(100), scheduler="dpm", steps=3)
    assert [call.t.item() for call in model.calls] == [990, 660, 330]


def test_one_half_without_guidance_and_two_with(model, objective, scheduler):
    options = {"objective": objective, "scheduler": scheduler, "steps": 3, "keep": 0.5}
    sample(model, [1, 2], **options)
    assert [len(call.x) for call in model.calls] == [2, 2, 2]
    assert all(call.keep == 0.5 and call.drop is None for call in model.calls)
    model.calls.clear()
    sample(model, [1, 2], guidance_scale=1.5, **options)
    assert [len(call.x) for call in model.calls] == [4, 4, 4]
    assert model.calls[0].y.tolist() == [1, 2, 10, 10]
    assert all(call.keep == 0.5 for call in model.calls)
    assert torch.equal(model.calls[1].x[:2], model.calls[1].x[2:])


def test_trace_with_lite_guidance(model, objective, scheduler):
    options = {"objective": objective, "scheduler": scheduler, "steps": 4, "guidance_scale": 1.25}
    samples = sample(model, [1, 5, 8], drop=0.0, uncond_drop=0.9, trace=True, **options)
    assert len(samples.steps) == 4
    for step, call in zip(samples.steps, model.calls, strict=True):
        assert step.time == call.t[0].item()
        assert step.grid == (5, 7)
        assert step.keep_prob.shape == step.keep_mask.shape == (3, 35)
        assert torch.equal(step.kept, step.keep_mask.sum(1))
        assert (step.uncond_kept < step.kept).all()
        assert step.x0.shape == (3, 3, 5, 7)
    assert [step.time for step in samples.steps] == sorted(
        (step.time for step in samples.steps), reverse=True
    )
    untraced = sample(model, [1, 5, 8], drop=0.0, uncond_drop=0.9, **options)
    assert untraced.steps == ()
    assert torch.equal(untraced.latents, samples.latents)


@pytest.mark.parametrize("scheduler", ["dpm", "flow-euler"])
def test_the_last_clean_image_is_the_result(model, objective, scheduler):
    """Both end with a first-order step to zero noise, which lands on the predicted image."""
    samples = sample(
        model, [1, 5], objective=objective, scheduler=scheduler, steps=4, trace=True,
        guidance_scale=2.0,
    )  # fmt: skip
    torch.testing.assert_close(samples.steps[-1].x0, samples.latents, rtol=1e-4, atol=1e-4)


def test_budgets_per_sample_reach_the_model(model, objective, scheduler):
    drop = torch.tensor([0.0, 0.5, 0.9])
    samples = sample(
        model, [2, 2, 2], objective=objective, scheduler=scheduler, steps=2, seed=(1, 1, 1),
        drop=drop, trace=True,
    )  # fmt: skip
    kept = samples.steps[0].kept.tolist()
    assert kept[0] > kept[1] > kept[2]
    assert samples.steps[0].uncond_kept is None


def test_a_model_without_routing(classes, objective, scheduler):
    inner = classes.StandIn(out_channels=objective.out_channels(3))
    options = {"objective": objective, "scheduler": scheduler, "steps": 3}
    samples = sample(classes.Plain(inner), [1, 2], trace=True, **options)
    assert samples.steps[0].kept is None
    assert samples.steps[0].keep_mask is None
    torch.testing.assert_close(samples.latents, sample(inner, [1, 2], **options).latents)


def test_clip_bounds_the_clean_image(model, objective, scheduler):
    options = {"objective": objective, "scheduler": scheduler, "steps": 6, "trace": True}
    free = sample(model, [1, 2], **options)
    bound = sample(model, [1, 2], clip=0.5, **options)
    assert max(step.x0.abs().max() for step in free.steps) > 1
    assert max(step.x0.abs().max() for step in bound.steps) <= 0.5
    assert bound.latents.abs().max() <= 0.5 + 1e-3
    loose = sample(model, [1, 2], clip=1e6, **options)
    torch.testing.assert_close(loose.latents, free.latents, rtol=1e-3, atol=1e-3)


def test_half_precision_model(classes, objective, scheduler):
    narrow = classes.StandIn(out_channels=objective.out_channels(3)).bfloat16()
    narrow.label.float()  # as a router that stays float32
    samples = sample(narrow, [1, 2], objective=objective, scheduler=scheduler, steps=3)
    assert samples.latents.dtype == torch.float32
    assert {call.x.dtype for call in narrow.calls} == {torch.bfloat16}
    assert {call.t.dtype for call in narrow.calls} == {torch.float32}
    assert not torch.equal(samples.latents, samples.latents.bfloat16().float())


def test_modes_are_restored_and_results_can_be_trained_on(model, objective, scheduler):
    model.train()
    model.read.eval()
    before = [module.training for module in model.modules()]
    options = {"objective": objective, "scheduler": scheduler, "steps": 3}
    first = sample(model, [1], **options).latents
    assert [module.training for module in model.modules()] == before
    assert torch.equal(first, sample(model, [1], **options).latents), "dropout was on"
    weight = torch.ones((), requires_grad=True)
    (weight * first).sum().backward()
    assert not first.requires_grad

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, [1], progress=stop, **options)
    assert [module.training for module in model.modules()] == before


def test_progress(model, objective, scheduler):
    seen = []
    options = {"objective": objective, "scheduler": scheduler, "steps": 4}
    sample(model, [1], progress=lambda done, total: seen.append((done, total)), **options)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    seen.clear()
    denoise(
        model, torch.zeros(1, 3, 5, 7), [1], start=0.55,
        progress=lambda done, total: seen.append((done, total)), **options,
    )  # fmt: skip
    assert seen[-1][0] == seen[-1][1] == len(seen) < 4


@pytest.mark.parametrize("start", [0.02, 0.3, 0.5, 1.0])
def test_denoise_begins_at_the_chosen_level(classes, objective, scheduler, start):
    x0 = torch.rand(2, 3, 4, 6) * 2 - 1
    model = classes.Knowing(objective, x0)
    samples = denoise(
        model, x0, [0, 1], objective=objective, start=start, scheduler=scheduler, steps=50,
        seed=3, trace=True,
    )  # fmt: skip
    first = samples.steps[0].time
    assert 1000 * start - 25 < first <= 1000 * start
    noise = torch.stack(
        [torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
    )
    t = torch.tensor([first, first])
    t = t / 1000 if scheduler == "flow-euler" else t.long()
    torch.testing.assert_close(samples.initial, objective.noisy(x0, noise, t))
    assert (samples.initial - x0).abs().mean() > 0.01
    torch.testing.assert_close(samples.latents, x0, rtol=1e-3, atol=2e-3)


def test_denoise_takes_at_least_one_step(model, objective, scheduler):
    x0 = torch.zeros(1, 3, 5, 7)
    denoise(model, x0, [0], objective=objective, scheduler=scheduler, steps=2, start=1e-4)
    assert len(model.calls) == 1


def test_output_that_is_not_finite(model, objective, scheduler):
    forward = model.forward

    def break_down(x, t, y, **options):
        return forward(x, t, y, **options) * (math.nan if len(model.calls) == 3 else 1)

    model.forward = break_down
    model.train()
    with pytest.raises(AdaptokError, match=r"not finite in step 3 of 4 \(time \d+") as error:
        sample(model, [1], objective=objective, scheduler=scheduler, steps=4)
    assert "weights" in str(error.value)
    assert model.training


class TestBadInput:
    @pytest.fixture
    def hybrid(self, classes):
        model = classes.StandIn().eval()
        return lambda labels=(0, 1), **options: sample(
            model, labels, **{"objective": HybridObjective(), "steps": 2, **options}
        )

    def test_labels(self, hybrid):
        assert hybrid([10]).latents.shape == (1, 3, 5, 7)
        for wrong in (-1, 11):
            with pytest.raises(LabelError, match=f"0 to 9, or 10 for no class, got {wrong}"):
                hybrid([0, wrong])
        with pytest.raises(ShapeError, match=r"one class per image \(b,\), got \(0,\)"):
            hybrid([])
        with pytest.raises(ShapeError, match=r"got \(1, 2\)"):
            hybrid(torch.zeros(1, 2, dtype=torch.long))
        with pytest.raises(DtypeError, match=r"labels needs whole numbers, got torch.float32"):
            hybrid([0.5])

    def test_schedulers(self, hybrid):
        with pytest.raises(ConfigError, match="no scheduler 'heun': choose one of ddpm, dpm, flow"):
            hybrid(scheduler="heun")
        with pytest.raises(ConfigError, match="'hybrid': use ddpm or dpm"):
            hybrid(scheduler="flow-euler")
        with pytest.raises(ConfigError, match=r"for the objective 'hybrid', .*: use flow-euler"):
            hybrid(objective=FlowObjective())
        for steps in (1, 1001, 2.0, True):
            with pytest.raises(ConfigError, match="'ddpm' takes 2 to 1000 steps, got"):
                hybrid(steps=steps)
        with pytest.raises(ConfigError, match="'dpm' takes 1 to 99 steps, got 100"):
            hybrid(scheduler="dpm", steps=100, objective=HybridObjective(100))
        with pytest.raises(ConfigError, match="'flow-euler' takes 1 or more steps, got 0"):
            hybrid(scheduler="flow-euler", steps=0, objective=FlowObjective())

    def test_seeds(self, hybrid):
        with pytest.raises(ConfigError, match="2 seeds here, got 3"):
            hybrid(seed=(1, 2, 3))
        for seed in (-1, 2**63, 0.5, "ab"):
            with pytest.raises(ConfigError, match="a seed needs a whole number from 0 to"):
                hybrid(seed=seed)

    def test_budgets(self, hybrid):
        with pytest.raises(BudgetError, match="exclude each other"):
            hybrid(drop=0.3, keep=0.5)
        with pytest.raises(BudgetError, match=r"drop is a fraction in \[0, 1\), got 1.5"):
            hybrid(drop=1.5)
        with pytest.raises(BudgetError, match="uncond_drop has no effect without"):
            hybrid(uncond_drop=0.9)
        with pytest.raises(BudgetError, match=r"drop is a fraction in \[0, 1\), got 1"):
            hybrid(uncond_drop=1.0, guidance_scale=2.0)

    def test_guidance(self, hybrid, classes):
        with pytest.raises(ConfigError, match="guided_channels has no effect without guidance"):
            hybrid(guided_channels=3)
        with pytest.raises(ConfigError, match="guidance_scale needs a number, got nan"):
            hybrid(guidance_scale=math.nan)
        with pytest.raises(ConfigError, match=r"guidance needs a model with forward_with_cfg"):
            sample(
                classes.Plain(classes.StandIn()), [0], objective=HybridObjective(),
                guidance_scale=2.0,
            )  # fmt: skip

    def test_shapes_and_devices(self, hybrid, classes):
        with pytest.raises(ShapeError, match=r"output of shape \(2, 3, 5, 7\).*\(2, 6, 5, 7\)"):
            hybrid(objective=FlowObjective(), scheduler="flow-euler")
        with pytest.raises(ShapeError, match="shape needs channels, height and width"):
            hybrid(shape=(3, 0, 5))
        with pytest.raises(ConfigError, match=r"give shape=\(channels, height, width\)"):
            sample(torch.nn.Identity(), [0], objective=HybridObjective())
        with pytest.raises(DeviceError, match="lies on cpu, and device=meta was asked for"):
            hybrid(device="meta")
        with pytest.raises(ConfigError, match="clip needs a positive number, got 0"):
            hybrid(clip=0)

    def test_denoise(self, classes):
        model = classes.StandIn().eval()
        for start in (0.0, 1.1, math.nan):
            with pytest.raises(ConfigError, match=r"start needs a number in \(0, 1\]"):
                denoise(
                    model, torch.zeros(1, 3, 5, 7), [0], objective=HybridObjective(), start=start
                )
        with pytest.raises(
            ShapeError, match=r"one image \(c, h, w\) per label, got \(1, 3, 5, 7\)"
        ):
            denoise(model, torch.zeros(1, 3, 5, 7), [0, 1], objective=HybridObjective())
        with pytest.raises(DtypeError, match="scale images"):
            denoise(model, torch.zeros(1, 3, 5, 7).byte(), [0], objective=HybridObjective())

    def test_without_diffusers(self, hybrid, monkeypatch):
        monkeypatch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(ImportError, match=r'pip install "adaptok\[diffusion\]"'):
            hybrid()


def test_importing_does_not_import_diffusers():
    code = "import sys, adaptok.diffusion; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
