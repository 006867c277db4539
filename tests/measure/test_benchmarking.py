"""Benchmarks: tokens and operations against closed forms, order, restoration, refusals."""

import pytest
import torch
from torch import nn
from wrapped_vit import IMAGE, UnevenRouter, make_wrapped, state_of

import adaptok
from adaptok.compiling import is_compiled
from adaptok.dc import DiT, DiTConfig
from adaptok.errors import ConfigError
from adaptok.measure import benchmark, benchmarking
from adaptok.testing import fill_weights, make_vit

QUICK = {"repeats": 1, "warmup": 0}
B, CELLS, WIDTH, DEPTH, CLASSES, PATCH = 3, 24, 96, 3, 10, 8


def count_blocks(tokens, b=B, depth=DEPTH, d=WIDTH):
    """2 m n k of every product in ViT blocks: qkv, scores, values, projection, two of the MLP."""
    products = [
        (tokens, d, 3 * d),
        (tokens, d, tokens),
        (tokens, tokens, d),
        (tokens, d, d),
        (tokens, d, 4 * d),
        (tokens, 4 * d, d),
    ]
    return b * depth * sum(2 * m * n * k for m, n, k in products)


def count_vit(cells=CELLS, b=B):
    embed = 2 * cells * WIDTH * 3 * PATCH * PATCH
    return b * (embed + 2 * WIDTH * CLASSES) + count_blocks(cells + 1)


@pytest.fixture(scope="module")
def report():
    return benchmark(make_wrapped(), IMAGE, [1.0, {"keep": 0.5}, {"tokens": 3}], **QUICK)


class TestWrapped:
    def test_tokens_are_exact(self, report):
        assert report.batch == B
        assert report.cells == CELLS
        rows = (report.base, *report.rows)
        assert [row.computed.mean for row in rows] == [24, 24, 12, 3]
        assert all(row.requested == row.computed for row in rows)
        assert [row.name for row in report.rows] == ["keep=1", "keep=0.5", "tokens=3"]

    def test_operations_of_the_baseline(self, report):
        assert report.base.gflops == pytest.approx(count_vit() / 1e9, rel=1e-9)

    def test_operations_fall_by_what_the_blocks_save(self, report):
        full, half, few = (1e9 * row.gflops for row in report.rows)
        assert full >= count_vit()  # router and dechunker come on top
        assert full < 1.2 * count_vit()
        assert full - half == pytest.approx(count_blocks(25) - count_blocks(13), rel=0.01)
        assert half - few == pytest.approx(count_blocks(13) - count_blocks(4), rel=0.01)

    def test_agreement(self, report):
        full, half, few = report.rows
        assert full.cosine == pytest.approx(1.0, abs=1e-9)
        assert full.relative_error < 1e-5
        assert half.cosine < 0.9999
        assert half.relative_error > 1e-3
        assert few.relative_error > 1e-3
        assert report.base.cosine is None

    def test_savings_follow_from_the_figures(self, report):
        base = report.base
        for row in report.rows:
            assert row.saved_flops == pytest.approx(1 - row.gflops / base.gflops)
            assert row.saved_time == pytest.approx(1 - row.ms / base.ms)
            assert row.images_per_second == pytest.approx(1000 * B / row.ms)
        assert report.rows[0].payoff is None  # nothing is saved
        half = report.rows[1]
        assert half.payoff == pytest.approx(half.saved_time / half.saved_flops)

    def test_memory_shrinks_with_the_tokens(self, report):
        full, half, few = (row.peak_mb for row in report.rows)
        assert full > half > few > 0
        assert report.memory == "live tensors"

    def test_setting(self, report):
        assert report.base.name == "the same model without its stages"
        assert report.inputs == ("0: float32 (3, 3, 32, 48)",)
        assert report.model.endswith("VisionTransformer")
        assert not report.compiled
        assert report.precision == "float32"
        weights = sum(4 * p.numel() for p in make_wrapped().parameters())
        assert report.weights_mb == pytest.approx(weights / 1e6, rel=0.01)


def test_counts_that_differ_by_sample_and_are_filled_up():
    model = make_wrapped(router=UnevenRouter(), budget=None)
    report = benchmark(model, IMAGE, [adaptok.Budget(), {"tokens": [3, 20, 9]}], **QUICK)
    with adaptok.trace(model) as trace, torch.no_grad():
        model(IMAGE)
    (plan,) = trace.steps[0].plans
    natural, given = report.rows
    assert natural.name == "natural"
    assert (natural.requested.least, natural.requested.most) == (
        int(plan.requested.min()),
        int(plan.requested.max()),
    )
    assert natural.computed.mean == pytest.approx(float(plan.computed.float().mean()))
    assert natural.computed.mean >= natural.requested.mean
    assert natural.requested.least < natural.requested.most
    assert given.requested.mean == pytest.approx(32 / 3)
    assert (given.requested.least, given.requested.most) == (3, 20)


class TestRun:
    def test_all_take_turns_in_one_run(self, monkeypatch):
        model, seen = make_wrapped(), []
        measure = benchmarking.measure_interleaved

        def note(candidates, **options):
            seen.clear()
            return measure(candidates, **options)

        monkeypatch.setattr(benchmarking, "measure_interleaved", note)
        blocks = model.blocks
        model.register_forward_pre_hook(
            lambda *_: seen.append((blocks.plain, blocks.stages[0].budget_setting.keep))
        )
        benchmark(model, IMAGE, [1.0, 0.25], repeats=3, warmup=1)
        assert seen == [(True, 0.5), (False, 1.0), (False, 0.25)] * 4

    def test_mode_of_the_calls(self):
        model, seen = make_wrapped().train(), []
        model.register_forward_pre_hook(
            lambda m, _: seen.append((m.training, torch.is_grad_enabled()))
        )
        benchmark(model, IMAGE, [0.5], **QUICK)
        assert set(seen) == {(False, False)}

    def test_steps_are_told(self):
        told = []
        benchmark(
            make_wrapped(),
            IMAGE,
            [1.0, 0.5],
            repeats=2,
            warmup=1,
            progress=lambda *step: told.append(step),
        )
        assert told == [(done, 6) for done in range(1, 7)]

    @pytest.mark.parametrize("as_given", [
        lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x},
        lambda x: adaptok.HostInputs((x,)), lambda x: adaptok.HostInputs((), {"x": x}),
    ], ids=["tensor", "tuple", "list", "mapping", "host args", "host kwargs"])  # fmt: skip
    def test_inputs_in_every_form(self, as_given):
        report = benchmark(make_wrapped(), as_given(IMAGE), [0.5], **QUICK)
        assert report.rows[0].computed.mean == 12

    def test_both_sides_are_compiled(self, monkeypatch):
        asked = []

        def compile_call(call):
            asked.append(call)
            return lambda *args: call(*args)

        def compile_adaptive(model):
            asked.append(model)
            return adaptok.compile(model, backend="eager")

        monkeypatch.setattr(benchmarking, "compile_call", compile_call)
        monkeypatch.setattr(benchmarking, "compile_adaptive", compile_adaptive)
        model, other = make_wrapped(), make_vit(depth=1)
        report = benchmark(model, IMAGE, [0.5], compile=True, baseline=other, **QUICK)
        assert asked == [model, other]
        assert not is_compiled(model)  # as it was before
        assert report.compiled
        assert "compiled" in str(report)

    def test_what_is_compiled_already_stays_so(self):
        model = adaptok.compile(make_wrapped(), backend="eager")
        report = benchmark(model, IMAGE, [1.0, 0.5], **QUICK)
        assert report.compiled
        assert is_compiled(model)
        assert report.base.gflops == pytest.approx(count_vit() / 1e9, rel=1e-9)
        assert report.rows[0].cosine == pytest.approx(1.0, abs=1e-6)


class TestBaseline:
    def test_another_module(self):
        other = make_vit(depth=1, seed=3).train()
        report = benchmark(make_wrapped(), IMAGE, [0.5], baseline=other, **QUICK)
        assert report.base.name == "the given VisionTransformer"
        assert report.base.computed is None
        assert report.base.gflops < report.rows[0].gflops
        assert report.rows[0].saved_flops < 0
        assert report.rows[0].cosine < 0.9
        assert other.training

    def test_a_function_of_another_shape(self):
        def pool(x):
            return x.mean((2, 3))

        report = benchmark(make_wrapped(), IMAGE, [0.5], baseline=pool, **QUICK)
        assert report.base.name == "the given pool"
        assert report.base.gflops == 0
        row = report.rows[0]
        assert row.saved_flops is None
        assert row.cosine is None
        assert "has no known FLOPs to compare" in str(report)


class TestRestoration:
    def make(self):
        model = make_wrapped(budget=0.25).train()
        model.blocks[1].eval()
        with adaptok.budget(model, keep=0.5):  # settings become attributes of the stage
            pass
        return model

    def assert_as_before(self, model, before, random):
        assert state_of(model) == before
        assert model.blocks.stages[0].budget_setting.keep == 0.25
        assert not model.blocks.plain
        assert model.blocks.observers == ()
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.is_grad_enabled()

    def test_after_a_run(self):
        model = self.make()
        before, random = state_of(model), torch.get_rng_state()
        benchmark(model, IMAGE, [1.0, 0.5], **QUICK)
        self.assert_as_before(model, before, random)

    @pytest.mark.parametrize("fatal", [1, 2, 4, 7])
    def test_after_an_error(self, fatal):
        model, calls = self.make(), []

        def fail(*_):
            calls.append(1)
            if len(calls) == fatal:
                raise RuntimeError("out of luck")

        hook = model.norm.register_forward_pre_hook(fail)
        before, random = state_of(model), torch.get_rng_state()
        with pytest.raises(RuntimeError, match="out of luck"):
            benchmark(model, IMAGE, [1.0, 0.5], **QUICK)
        self.assert_as_before(model, before, random)
        hook.remove()

    def test_training_still_works(self):
        model = self.make()
        benchmark(model, IMAGE, [0.5], **QUICK)
        model(IMAGE).sum().backward()
        assert model.patch_embed.proj.weight.grad is not None


def make_reference(layout="packed", grid=(8, 12), width=512, **options):
    # wide enough that products outweigh elementwise work, which the counter does not see
    config = adaptok.DCDiTConfig(
        hidden_size=width,
        depth=2,
        num_heads=4,
        latent_size=grid,
        num_classes=10,
        layout=layout,
        **options,
    )
    model = fill_weights(adaptok.DCDiT(config)).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *grid, generator=generator)
    return model, (x, torch.tensor([30, 700]), torch.tensor([1, 4]))


class TestReference:
    @pytest.mark.parametrize(
        ("layout", "grid", "budgets"),
        [
            ("packed", (8, 12), [1.0, {"tokens": [12, 90]}]),
            ("bucketed", (16, 16), [{"tokens": [20, 170]}, {"keep": 0.3}]),
            ("fixed", (8, 24), [{"tokens": 48}, 0.9]),
        ],
    )
    def test_counter_and_closed_form_agree(self, layout, grid, budgets):
        model, inputs = make_reference(layout, grid)
        report = benchmark(model, inputs, budgets, **QUICK)
        for row in (report.base, *report.rows):
            assert row.gflops == pytest.approx(row.formula_gflops, rel=0.01), row.name

    def test_tokens_of_layouts(self):
        cells, given = 96, {"tokens": [12, 91]}
        for layout, computed in (("packed", [12, 91]), ("bucketed", [12, 96])):
            model, inputs = make_reference(layout, width=64, buckets=8)
            row = benchmark(model, inputs, [given], **QUICK).rows[0]
            assert (row.requested.least, row.requested.most) == (12, 91)
            assert (row.computed.least, row.computed.most) == tuple(computed)
            assert row.computed.most <= cells

    def test_baseline_is_the_full_budget_and_said_so(self):
        model, inputs = make_reference(width=64)
        report = benchmark(model, inputs, [1.0, 0.25], **QUICK)
        assert report.base.name == "the same model at keep=1 (no baseline was given)"
        assert report.base.computed.mean == 96
        full, quarter = report.rows
        assert full.cosine == pytest.approx(1.0)
        assert quarter.computed.mean == 24
        assert quarter.cosine < 0.9999
        assert quarter.saved_flops > 0.1

    def test_against_a_fixed_patch_dit(self):
        model, inputs = make_reference(grid=(8, 8), width=64)
        config = DiTConfig(
            hidden_size=64, depth=2, num_heads=4, latent_size=8, num_classes=10, patch_size=2
        )
        report = benchmark(model, inputs, [0.25], baseline=DiT(config), **QUICK)
        assert report.base.name == "the given DiT"
        assert report.base.computed.mean == 16
        assert report.base.formula_gflops > 0
        assert report.rows[0].computed.mean == 16

    def test_arguments_by_name(self):
        model, (x, t, y) = make_reference(width=64)
        report = benchmark(model, {"x": x, "t": t, "y": y}, [0.5], **QUICK)
        assert report.rows[0].computed.mean == 48

    @pytest.mark.parametrize("extra", [{"keep": 0.5}, {"return_routing": True}], ids=str)
    def test_options_that_are_no_inputs(self, extra):
        model, inputs = make_reference(width=64)
        with pytest.raises(ConfigError, match="a DCDiT is measured with x, t and y"):
            benchmark(model, adaptok.HostInputs(inputs, extra), [0.5], **QUICK)

    def test_budget_is_restored(self):
        model, inputs = make_reference(width=64)
        adaptok.set_budget(model, tokens=5)
        benchmark(model.train(), inputs, [0.5], **QUICK)
        assert model.budget_setting.tokens == 5
        assert model.training


def test_a_list_of_inputs_is_described():
    model = make_wrapped()

    class Host(nn.Module):
        """Takes what is no tensor beside the image."""

        def __init__(self):
            super().__init__()
            self.vit = model

        def forward(self, image, scales, *, name=None):
            return self.vit(image * scales[0])

    inputs = adaptok.HostInputs((IMAGE, [torch.tensor(1.0)]), {"name": "a"})
    report = benchmark(Host(), inputs, [0.5], **QUICK)
    assert report.inputs == ("0: float32 (3, 3, 32, 48)", "1: [float32 ()] x 1", "name: a")
