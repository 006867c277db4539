"""Pictures: what is on them, where it lies, and that it is the data."""

import numpy as np
import pytest
import torch
from see_figures import assert_tidy, render, texts_of

from adaptok.errors import ShapeError, StorageError
from adaptok.see import (
    Denoised,
    Frame,
    KeptCurve,
    SampleRow,
    draw_denoised,
    draw_kept_by_time,
    draw_loss,
    draw_sample_grid,
    draw_trajectory,
    save_figure,
    shade_dropped,
)
from adaptok.see.canvas import fit_box
from adaptok.see.curves import running_mean


def make_images(count, size=(16, 16)):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def make_row(name="drop 0.3", count=3, **options):
    tokens = tuple(100.0 + i for i in range(count))
    return SampleRow(name, make_images(count), tokens, gflops=1.234, ms=5.67, **options)


def make_frame(noise=0.5, grid=(8, 8), size=(16, 16)):
    noisy, clean = make_images(2, size)
    prob = torch.rand(grid[0] * grid[1], generator=torch.Generator().manual_seed(1))
    return Frame(noise, noisy, clean, prob, prob > 0.7, grid)


class TestSampleGrid:
    def test_captions_and_axes(self):
        figure = draw_sample_grid([make_row(), make_row("drop 0.6")], ["cat", "dog", "fish"])
        assert len(figure.axes) == 6
        words = [text.get_text() for text in texts_of(figure)]
        for needed in ("cat", "dog", "fish", "drop 0.3", "drop 0.6", "102 tokens"):
            assert needed in words
        assert words.count("101 tokens  ·  1.23 GFLOPs  ·  5.7 ms") == 2

    @pytest.mark.parametrize("count", [1, 3, 8])
    def test_tidy(self, count):
        columns = ["Smileys & Emotion", "Animals & Nature", "Travel & Places"] * 3
        row = make_row("Lite-CFG 1.5, uncond. drop 0.9", count)
        assert_tidy(draw_sample_grid([row, row], columns[:count]))

    def test_tidy_with_names_and_a_long_note(self):
        rows = [make_row(count=n, names=("Smileys & Emotion",) * n) for n in (4, 2)]
        note = "flow-euler, 50 steps, drop 0.3, guidance 1.5, uncond. drop 0.9, " * 3
        assert_tidy(draw_sample_grid(rows, note=note))

    def test_pixels_are_shown_as_they_are(self):
        row = make_row(count=1)
        figure = draw_sample_grid([row], ["cat"])
        shown = render(figure)
        box = figure.axes[0].get_window_extent()
        top, left = round(shown.shape[0] - box.y1), round(box.x0)
        cell = round(box.width) // 16
        assert round(box.width) == round(box.height) == 16 * cell
        for i, j in ((1, 1), (5, 9), (14, 3)):
            found = shown[top + i * cell + cell // 2, left + j * cell + cell // 2]
            np.testing.assert_array_equal(found, row.images[0, :, i, j].numpy())

    def test_bad_input(self):
        with pytest.raises(ShapeError, match="at least one row"):
            draw_sample_grid([], ["cat"])
        with pytest.raises(ShapeError, match="3 images for 1 columns"):
            draw_sample_grid([make_row()], ["cat"])
        with pytest.raises(ShapeError, match="one token count per image"):
            SampleRow("x", make_images(2), (1.0,), 1.0, 1.0)
        with pytest.raises(ShapeError, match="one name per image"):
            make_row(names=("cat",))
        with pytest.raises(ShapeError, match=r"shape \(3, h, w\)"):
            draw_sample_grid([SampleRow("x", torch.zeros(1, 4, 8, 8), (1.0,), 1.0, 1.0)], ["x"])


class TestMaps:
    def test_kept_cells_keep_their_colour(self):
        image = make_images(1)[0]
        mask = torch.zeros(64, dtype=torch.bool)
        mask[[0, 10, 63]] = True
        shown = shade_dropped(image, mask, (8, 8))
        pixels = image.permute(1, 2, 0).numpy()
        kept = np.kron(mask.numpy().reshape(8, 8), np.ones((2, 2))).astype(bool)
        np.testing.assert_array_equal(shown[kept], pixels[kept])
        dropped = shown[~kept].astype(int)
        assert (dropped.max(1) < 100).all()
        assert (dropped != pixels[~kept]).any(1).mean() > 0.99

    def test_shade_refuses_a_grid_that_does_not_fit(self):
        with pytest.raises(ShapeError, match="does not divide into 3 x 3 cells"):
            shade_dropped(make_images(1)[0], torch.ones(9, dtype=torch.bool), (3, 3))

    def test_trajectory(self):
        figure = draw_trajectory([make_frame(noise) for noise in (1.0, 0.51, 0.04)])
        assert len(figure.axes) == 3 * 4 + 1
        words = [text.get_text() for text in texts_of(figure)]
        share = f"{make_frame().kept:.1%}"
        assert f"51%\n{share}" in words
        assert_tidy(figure)

    def test_map_shows_the_probabilities(self):
        frame = make_frame()
        figure = draw_trajectory([frame])
        shown = figure.axes[2].images[0]
        np.testing.assert_array_equal(shown.get_array(), frame.keep_prob.reshape(8, 8).numpy())
        assert shown.get_clim() == (0, 1)
        pixels = render(figure)
        box = figure.axes[2].get_window_extent()
        side = box.width / 8
        top = pixels.shape[0] - box.y1

        def colour(cell):
            i, j = divmod(int(cell), 8)
            return pixels[int(top + (i + 0.5) * side), int(box.x0 + (j + 0.5) * side)].astype(int)

        high, low = colour(frame.keep_prob.argmax()), colour(frame.keep_prob.argmin())
        assert high.sum() > low.sum() + 150  # light means a high probability

    def test_not_square(self):
        frame = make_frame(grid=(4, 8), size=(8, 16))
        assert_tidy(draw_trajectory([frame, frame]))

    def test_denoised(self):
        first, last = make_frame(0.6), make_frame(0.05)
        example = Denoised("Animals & Nature", *make_images(2), first, last)
        figure = draw_denoised([example, example])
        assert len(figure.axes) == 2 * 6 + 1
        assert "60% noise" in [text.get_text() for text in texts_of(figure)]
        assert_tidy(figure)

    def test_bad_input(self):
        with pytest.raises(ShapeError, match="at least one frame"):
            draw_trajectory([])
        with pytest.raises(ShapeError, match="at least one example"):
            draw_denoised([])
        good = make_frame()
        with pytest.raises(ShapeError, match="7"):
            Frame(0.5, good.noisy, good.clean, good.keep_prob, good.keep_mask, (7, 8))


class TestCurves:
    curve = KeptCurve("drop 0", (1.0, 0.6, 0.2), np.array([[0.1, 0.3], [0.2, 0.4], [0.5, 0.7]]))

    def test_kept_by_time(self):
        figure = draw_kept_by_time([self.curve], target=0.25)
        (axes,) = figure.axes
        np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.2, 0.3, 0.6])
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1.0, 0.6, 0.2])
        assert axes.get_xlim() == (1, 0)
        assert axes.get_ylim()[0] == 0
        words = [text.get_text() for text in axes.get_legend().get_texts()]
        assert words == ["drop 0", "training target 25%"]
        assert_tidy(figure)

    def test_mean_between(self):
        assert self.curve.mean_between(0.75, 1.0) == pytest.approx(0.2)
        assert self.curve.mean_between(0.0, 0.25) == pytest.approx(0.6)
        assert self.curve.mean_between(0.3, 0.4) is None

    def test_loss(self):
        figure = draw_loss([1, 2, 3, 4], [4.0, 2.0, 2.0, 0.0], smooth=2)
        each, smooth = figure.axes[0].lines
        np.testing.assert_array_equal(each.get_ydata(), [4, 2, 2, 0])
        np.testing.assert_array_equal(smooth.get_ydata(), [4, 3, 2, 1])
        assert_tidy(figure)

    def test_running_mean_of_few(self):
        np.testing.assert_allclose(running_mean([3.0, 6.0], 9), [3.0, 4.5])

    def test_bad_input(self):
        with pytest.raises(ShapeError, match="at least one curve"):
            draw_kept_by_time([])
        with pytest.raises(ShapeError, match="one loss per step"):
            draw_loss([1], [])
        with pytest.raises(ShapeError, match=r"\(steps, samples\)"):
            KeptCurve("x", (1.0,), np.zeros((2, 3)))


def test_boxes_are_whole_multiples():
    for side in (8, 16, 32, 48, 64):
        width, height = fit_box(side, side, 192)
        assert width == height
        assert width % side == 0
        assert width > 96


def test_save(tmp_path):
    figure = draw_loss([1, 2], [1.0, 0.5])
    path = save_figure(figure, tmp_path / "new" / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StorageError, match="cannot write the picture"):
        save_figure(figure, tmp_path / "loss.nonsense")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the picture"):
        save_figure(figure, tmp_path / "file" / "loss.png")
