"""From traces to pictures: that they show what was decided, cell by cell."""

import numpy as np
import pytest
import torch
from see_figures import assert_tidy, render, words_of
from wrapped_vit import UnevenRouter

import adaptok
from adaptok import see
from adaptok.chunking import Provenance
from adaptok.errors import ShapeError
from adaptok.see.following import find_own_cells, follow_sites, follow_stages
from adaptok.see.report import count_steps
from adaptok.see.report_runs import read_run
from adaptok.testing import make_vit

IMAGES = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(3))


def run(*stack, calls=1, images=IMAGES, **options):
    vit = adaptok.wrap(make_vit(), stack=list(stack), **options)
    with adaptok.trace(vit) as seen, torch.no_grad():
        for _ in range(calls):
            vit(images)
    return seen


def make_noise(name, steps=20, side=32, b=8):
    """A run whose images do not get smaller by compression."""
    generator = np.random.default_rng(int(name, 36))
    token = np.zeros((b, side * side), dtype=int)
    own = np.eye(1, side * side, dtype=bool).repeat(b, axis=0)
    made = [
        see.ReportStep(
            f"{number}", generator.integers(0, 256, (b, side, side, 3), dtype=np.uint8), token, own,
            (1,) * b, clean=generator.integers(0, 256, (b, side, side, 3), dtype=np.uint8),
        )
        for number in range(steps)
    ]  # fmt: skip
    return see.ReportRun(name, (side, side), tuple(made))


@pytest.fixture(scope="module")
def stacked():
    return run("dc", "tome", budget=0.5)


@pytest.fixture(scope="module")
def pruned():
    return run({"name": "evit", "fuse": False}, budget=0.5)


@pytest.fixture(scope="module")
def uneven():
    vit = adaptok.wrap(make_vit(), chunker="dc", router=UnevenRouter())
    with adaptok.trace(vit) as seen, torch.no_grad():
        for shift in range(5):
            vit((IMAGES + 0.1 * shift).clamp(max=1))
    return seen


class TestFollowing:
    def test_the_last_stage_is_the_provenance_of_the_trace(self, stacked, pruned):
        for seen in (stacked, pruned):
            step = seen.steps[0]
            assert torch.equal(follow_stages(seen)[-1].token, step.provenance.token)
            assert torch.equal(torch.tensor(follow_stages(seen)[-1].counts), step.kept)

    def test_the_first_stage_is_its_own_plan(self, stacked):
        first = follow_stages(stacked)[0]
        assert torch.equal(first.token, stacked.steps[0].plans[0].provenance.token)
        assert first.counts == (12, 12, 12)

    def test_each_token_has_one_cell_of_its_own(self, stacked, pruned, uneven):
        for seen in (stacked, pruned, uneven):
            step, own = seen.steps[-1], find_own_cells(seen)
            for sample in range(3):
                tokens = step.provenance.token[sample][own[sample]]
                assert sorted(tokens.tolist()) == list(range(int(step.kept[sample])))

    def test_own_cells_of_one_stage_are_those_it_kept(self, uneven):
        assert torch.equal(find_own_cells(uneven), uneven.steps[-1].plans[0].keep_mask)

    def test_sites_go_through_the_stage_outside(self, stacked):
        events = stacked.steps[0].plans[1].events
        places = follow_sites(stacked)
        assert len(places) == len(events)
        outer = follow_stages(stacked)[0].token
        expected = Provenance(outer).then(Provenance(events[0].owner)).token
        assert torch.equal(places[0].token, expected)
        assert places[-1].counts == (6, 6, 6)

    def test_a_stage_inside_another_is_not_moved_out(self):
        seen = run("tomesd", "evit", budget=0.5)  # tomesd tells after what is inside it
        assert [place.name for place in follow_stages(seen)] == ["tomesd", "evit"]

    def test_there_is_no_such_step(self, stacked):
        with pytest.raises(ShapeError, match="no step 1 in a trace of 1"):
            follow_stages(stacked, 1)


class TestTokens:
    def test_panels(self, stacked):
        figure = see.show_tokens(stacked, IMAGES, sample=1)
        assert len(figure.axes) == 5 + 1  # image, probability, kept, dc, tome; the colour bar
        words = words_of(figure)
        for needed in ("6 tokens for 24 cells", "the image", "kept cells", "12 of 24", "dc",
                       "12 tokens", "tome", "6 tokens", "keep probability"):  # fmt: skip
            assert needed in words
        assert_tidy(figure)

    def test_kept_cells_are_those_of_the_trace(self, stacked):
        figure = see.show_tokens(stacked, IMAGES, sample=2)
        shown = figure.axes[2].images[0].get_array()
        keep = stacked.steps[0].plans[0].keep_mask[2].view(4, 6)
        pixels = (IMAGES[2] * 255).round().byte().permute(1, 2, 0).numpy()
        for row, column in np.ndindex(4, 6):
            part = np.s_[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert (shown[part] == pixels[part]).all() == bool(keep[row, column])

    def test_borders_and_hatching(self, pruned):
        figure = see.show_tokens(pruned, IMAGES)
        token = pruned.steps[0].provenance.token[0].view(4, 6)
        lines, _, hatched = figure.axes[-1].collections
        assert len(hatched.get_paths()) == int((token < 0).sum()) == 12
        across = (token[:, 1:] != token[:, :-1]).sum() + (token[1:] != token[:-1]).sum()
        assert len(lines.get_segments()) == int(across)
        assert "Hatched: no token stands for these cells." in words_of(figure).replace("\n", " ")
        assert "keep probability" not in words_of(figure)  # no router
        assert_tidy(figure)

    def test_no_hatching_is_named_where_there_is_none(self, stacked):
        assert "Hatched" not in words_of(see.show_tokens(stacked, IMAGES))

    def test_sites(self, pruned):
        figure = see.show_sites(pruned, IMAGES, most=2)
        assert len(figure.axes) == 3
        assert "evit, block 2" in words_of(figure)
        assert_tidy(figure)
        with pytest.raises(ShapeError, match="merges or prunes between blocks"):
            see.show_sites(run("dc", budget=0.5), IMAGES)

    def test_bad_input(self, stacked):
        with pytest.raises(ShapeError, match="no sample 3 in a trace of 3"):
            see.show_tokens(stacked, IMAGES[0], sample=3)
        with pytest.raises(ShapeError, match="no step 4"):
            see.show_tokens(stacked, IMAGES, step=4)

    def test_one_image_for_any_sample(self, stacked):
        a = see.show_tokens(stacked, IMAGES[1], sample=1)
        b = see.show_tokens(stacked, IMAGES, sample=1)
        assert (render(a) == render(b)).all()


class TestTrajectory:
    def test_strips_and_chart(self, uneven):
        images = [(IMAGES + 0.1 * shift).clamp(max=1) for shift in range(5)]
        figure = see.show_trajectory(uneven, images, samples=[2, 0], names=["cat", "dog"], count=3)
        assert len(figure.axes) == 2 * 2 * 3 + 1
        chart = figure.axes[-1]
        assert len(chart.lines) == 3
        shares = np.array([line.get_ydata() for line in chart.lines])
        expected = torch.stack([step.kept for step in uneven.steps]).T / 24
        np.testing.assert_allclose(shares, expected)
        assert [text.get_text() for text in chart.get_legend().get_texts()] == ["dog", "cat"]
        last = float(uneven.steps[-1].kept[2]) / 24
        assert f"{last:.0%}" in words_of(figure)
        shown = figure.axes[4].images[0].get_array()  # the last input of the first strip
        assert (shown == (images[-1][2] * 255).round().byte().permute(1, 2, 0).numpy()).all()
        assert_tidy(figure)

    def test_bad_input(self, uneven):
        with pytest.raises(ShapeError, match="got 1 for 5 steps"):
            see.show_trajectory(uneven, [IMAGES])
        with pytest.raises(ShapeError, match="there are 3 samples"):
            see.show_trajectory(uneven, [IMAGES] * 5, samples=[3])


class TestReportRuns:
    def test_a_trace_as_a_run(self, uneven):
        made = read_run("keep", uneven, IMAGES, step_names=[f"s{i}" for i in range(5)])
        assert [step.name for step in made.steps] == ["s0", "s1", "s2", "s3", "s4"]
        step, seen = made.steps[3], uneven.steps[3]
        np.testing.assert_array_equal(step.token, seen.provenance.token)
        np.testing.assert_array_equal(step.own, seen.plans[0].keep_mask)
        np.testing.assert_allclose(step.keep_prob, seen.routings[0].keep_prob, atol=1e-6)
        assert step.tokens == tuple(seen.kept.tolist())
        assert step.gflops == pytest.approx(seen.flops / 3e9)
        assert step.ms == pytest.approx(seen.ms / 3)

    def test_costs_stay_when_steps_are_left_out(self, uneven):
        made = read_run("keep", uneven, IMAGES)
        few = made.choose_steps(2)
        assert [step.name for step in few.steps] == ["step 1 of 5", "step 5 of 5"]
        assert few.mean_tokens == made.mean_tokens
        assert few.mean_cost == pytest.approx(made.mean_cost)

    def test_many_budgets_have_fewer_steps_in_a_file_of_bounded_size(self, tmp_path):
        few = [make_noise("a")]
        many = [make_noise(str(number)) for number in range(6)]
        sizes = []
        for runs in (few, many):
            path = see.write_runs(runs, tmp_path / "r.html")
            sizes.append(path.stat().st_size)
        assert count_steps(few) == 16
        assert 3 <= count_steps(many) < 16
        assert sizes[0] < sizes[1] < 3_000_000

    def test_write_report(self, uneven, stacked, tmp_path):
        path = see.write_report(
            {"a": uneven, "b": uneven}, IMAGES, tmp_path / "r.html", names=["x", "y", "z"],
            results={"a": IMAGES},
        )  # fmt: skip
        text = path.read_text(encoding="utf-8")
        assert text.count("data:image/") < 3 + 3 + 5  # images that repeat are stored once
        assert see.write_report(stacked, IMAGES, tmp_path / "s.html").stat().st_size < 200_000

    def test_bad_input(self, uneven, stacked, tmp_path):
        with pytest.raises(ShapeError, match="5 steps, got 2 batches"):
            see.write_report(uneven, [IMAGES] * 2, tmp_path / "r.html")
        with pytest.raises(ShapeError, match="one name per sample, got 1 for 3"):
            see.write_report(uneven, IMAGES, tmp_path / "r.html", names=["x"])
        with pytest.raises(ShapeError, match="at least one run"):
            see.write_runs([], tmp_path / "r.html")
        other = run("dc", budget=0.5, images=IMAGES[:2])
        with pytest.raises(ShapeError, match="need the same samples"):
            see.write_runs(
                [read_run("a", stacked, IMAGES), read_run("b", other, IMAGES[:2])],
                tmp_path / "r.html",
            )
        (tmp_path / "file").write_text("")
        with pytest.raises(adaptok.errors.StorageError, match="cannot make the folder"):
            see.write_report(stacked, IMAGES, tmp_path / "file" / "r.html")
        step = read_run("a", stacked, IMAGES).steps[0]
        with pytest.raises(ShapeError, match="FLOPs with measured time"):
            see.ReportStep("a", step.given, step.token, step.own, step.tokens, gflops=1.0)
