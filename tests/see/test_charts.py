"""Charts: depths, reused steps, budgets, and the diagram of a stack."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from adaptok_exit.confidence import ConfidenceExit
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from see_figures import assert_tidy, words_of

import adaptok
from adaptok import see
from adaptok.diffusion import FlowObjective, sample
from adaptok.errors import ShapeError
from adaptok.measure import benchmark
from adaptok.see.budget_curves import read_curve
from adaptok.see.canvas import COLOURS, QUIET
from adaptok.testing import make_vit
from adaptok.trace_step import TraceStep
from adaptok.tracing import Trace


def make_trace(*depths):
    seen = Trace()
    cells = adaptok.Provenance.identity(len(depths[0]), 4)
    for row in depths:
        seen.steps.append(
            TraceStep((2, 2), (), (), (), cells, 0, 1.0, None if row is None else torch.tensor(row))
        )
    return seen


class TestDepths:
    def test_one_step_is_a_histogram(self):
        figure = see.show_depths(make_trace([3, 3, 12, 7, -1]), blocks=12)
        bars = figure.axes[0].patches
        heights = [bar.get_height() for bar in bars]
        assert {place: height for place, height in enumerate(heights) if height} == {
            0: 1, 3: 2, 7: 1, 12: 1,
        }  # fmt: skip
        assert to_hex(bars[12].get_facecolor()) == QUIET.lower()
        assert to_hex(bars[3].get_facecolor()) == COLOURS[0].lower()
        assert "80% leave early; 5.0 of 12 blocks" in words_of(figure)
        assert_tidy(figure)

    def test_several_steps_are_a_field(self):
        figure = see.show_depths(make_trace([3, 12], [12, 12], [5, 7]))
        field = figure.axes[0].images[0]
        np.testing.assert_array_equal(field.get_array(), [[3, 12, 5], [12, 12, 7]])
        assert field.get_clim() == (0, 12)
        assert len(figure.axes) == 2
        assert_tidy(figure)

    def test_a_real_exit(self):
        vit = adaptok.wrap(make_vit(depth=4), stack=[{"name": "exit", "threshold": 0.5}])
        (stage,) = (part for part in vit.modules() if isinstance(part, ConfidenceExit))
        for weight in stage.judges.parameters():
            torch.nn.init.normal_(weight)  # a fresh one lets nobody leave
        with adaptok.trace(vit) as seen, torch.no_grad():
            vit(torch.randn(12, 3, 32, 48))
        found = np.array(
            [bar.get_height() for bar in see.show_depths(seen, blocks=4).axes[0].patches]
        )
        assert found.sum() == 12
        assert 0 < found[:4].sum() == int((seen.steps[0].depths < 4).sum())

    def test_bad_input(self):
        with pytest.raises(ShapeError, match='stack=\\["exit"\\]'):
            see.show_depths(Trace())
        seen = make_trace([1, 2])
        seen.steps.append(make_trace([0]).steps[0])
        with pytest.raises(ShapeError, match="how deep"):
            see.show_depths(seen)


class TestReuse:
    flags = ((True, True), (True, False), (False, False), (True, True))

    def test_colours_are_the_flags(self):
        figure = see.show_reuse(self.flags, names=["cat", "Smileys & Emotion"])
        for column in range(2):
            bars = figure.axes[2 + column].patches
            found = [to_hex(bar.get_facecolor()) == COLOURS[0].lower() for bar in bars]
            assert found == [step[column] for step in self.flags]
        for needed in ("3 of 4", "2 of 4", "62% of the steps", "computed", "reused"):
            assert needed in words_of(figure)
        assert_tidy(figure)

    def test_images(self):
        images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
        figure = see.show_reuse(self.flags, images=images)
        assert len(figure.axes) == 2 + 4
        assert (figure.axes[4].images[0].get_array() == images[1].permute(1, 2, 0).numpy()).all()
        assert_tidy(figure)

    def test_trace_of_a_cache(self):
        config = adaptok.DCDiTConfig(
            hidden_size=64, depth=2, num_heads=2, latent_size=8, in_channels=3, learn_sigma=False
        )
        stack = [{"name": "taylorseer", "interval": 2}]
        dit = adaptok.wrap(adaptok.DCDiT(config).eval(), stack=stack)
        with adaptok.trace(dit) as seen:
            sample(
                dit, [0, 1], objective=FlowObjective(), scheduler="flow-euler", steps=6, keep=1.0
            )
        found = [step.reused.tolist() for step in seen.steps]
        assert found == [[False] * 2, [False] * 2, [True] * 2, [False] * 2, [True] * 2, [False] * 2]
        assert sum(step.flops == 0 for step in seen.steps) == 2
        figure = see.show_reuse(seen)
        assert any("67% of the steps" in text.get_text() for text in figure.texts)

    def test_bad_input(self):
        for flags in ([], [()], [(True,), (True, False)]):
            with pytest.raises(ShapeError, match="a flag for each sample"):
                see.show_reuse(flags)
        vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        with adaptok.trace(vit) as seen:
            vit(torch.randn(2, 3, 32, 48))
        assert seen.steps[0].reused is None
        with pytest.raises(ShapeError, match="a stage that reuses steps"):
            see.show_reuse(seen)


class TestBudgets:
    def curve(self, name="dc", **options):
        points = [
            see.CostPoint(f"keep {k}", 64 * k, 2 * k, 3 + 5 * k, 0.5 + k / 2, 0.01)
            for k in (1, 0.5)
        ]
        return see.CostCurve(name, tuple(points), **options)

    def test_three_costs_and_never_flops_alone(self):
        figure = see.show_budgets([self.curve(), self.curve("random", floor=True)], note="a CPU")
        tokens, flops, ms = figure.axes
        for axes, expected in ((tokens, [32, 64]), (flops, [1, 2]), (ms, [5.5, 8])):
            assert list(axes.lines[0].get_xdata()) == expected
            assert list(axes.lines[0].get_ydata()) == [0.75, 1.0]
            assert axes.get_xlim()[0] == 0
            assert axes.get_ylim() == tokens.get_ylim()
        assert [axes.get_xlabel() for axes in figure.axes] == ["tokens", "GFLOPs", "ms"]
        assert "higher is better" in tokens.get_ylabel()
        legend = tokens.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == ["dc", "random"]
        assert tokens.lines[-1].get_color() == QUIET
        assert_tidy(figure)

    @pytest.mark.parametrize(("size", "moved"), [(1.0, False), (1e-5, True), (-123456.0, True)])
    def test_the_label_stays_inside_beside_long_numbers(self, size, moved):
        points = tuple(
            see.CostPoint(f"keep {k}", 64 * k, 2 * k, 3 + 5 * k, size * (1 + k / 50))
            for k in (1, 0.5)
        )
        figure = see.show_budgets([see.CostCurve("dc", points)], quality="a distance")
        first, second, last = figure.axes
        renderer = FigureCanvasAgg(figure).get_renderer()
        label = first.yaxis.get_tightbbox(renderer)
        assert label.x0 > 10, "the label would be cut"
        assert label.y0 > 0
        assert not first.yaxis.get_offset_text().get_text(), "it would lie under the legend"
        assert (first.get_position().x0 * 1240 > 153) == moved
        assert last.get_position().x1 == pytest.approx(1208 / 1240, abs=2e-3)
        assert first.get_position().x1 < second.get_position().x0
        assert_tidy(figure)

    def test_curves_differ_without_colour(self):
        figure = see.show_budgets([self.curve(str(i)) for i in range(7)])
        lines = [
            line for line in figure.axes[2].lines if line.get_marker() not in ("_", "None", "|")
        ]
        looks = {(line.get_marker(), line.get_color()) for line in lines}
        assert len(looks) == 7

    def test_from_benchmarks(self):
        vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        report = benchmark(vit, torch.randn(2, 3, 32, 48), budgets=[1.0, 0.5], repeats=2)
        figure = see.show_budgets({"dc": report})
        row = min(report.rows, key=lambda row: row.ms)
        assert figure.axes[2].lines[0].get_xdata()[0] == pytest.approx(row.ms / 2)
        assert max(figure.axes[0].lines[0].get_ydata()) == pytest.approx(1.0, abs=1e-3)
        blind = report.model_copy(
            update={"rows": tuple(r.model_copy(update={"cosine": None}) for r in report.rows)}
        )
        with pytest.raises(ShapeError, match="can be compared"):
            read_curve("dc", blind)

    def test_bad_input(self):
        with pytest.raises(ShapeError, match="at least one curve"):
            see.show_budgets([])


class TestStack:
    def test_boxes_lie_inside_each_other_in_the_solvers_order(self):
        vit = adaptok.wrap(make_vit(depth=6), stack=["tome", "exit", "dc"], budget=0.5, span=(1, 6))
        figure = see.show_stack(vit)
        bold = [text.get_text() for text in figure.texts if text.get_fontweight() == "bold"]
        assert bold[1:] == [*(stage.name for stage in adaptok.explain(vit).stages), "blocks 1 to 5"]
        assert bold[1] == "exit"
        (axes,) = figure.axes
        (*frames,) = (patch for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch")
        boxes = [frame.get_extents() for frame in frames[::2]]
        assert len(boxes) == 3
        for outer, inner in pairwise(boxes):
            assert outer.x0 < inner.x0
            assert inner.x1 < outer.x1
            assert outer.y0 < inner.y0
            assert inner.y1 < outer.y1
        assert len(axes.patches) - len(frames) == 5
        words = words_of(figure).replace("\n", " ")
        for needed in ("leaves early", "saves blocks", "saves tokens", "1 more outside all stages"):
            assert needed in words
        assert_tidy(figure)

    def test_of_an_explanation(self):
        vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        assert words_of(see.show_stack(adaptok.explain(vit))) == words_of(see.show_stack(vit))
