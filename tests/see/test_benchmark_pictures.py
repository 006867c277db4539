"""The picture of a benchmark: what is on it, and that it is the data."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from adaptok.measure import BenchmarkReport, BenchmarkRow, TokenCount, describe_machine
from adaptok.see import draw_benchmark, save_figure
from adaptok.see.benchmarks import stack_labels


def make_row(name, tokens, ms, gflops, cosine=0.9):
    return BenchmarkRow(
        name=name,
        requested=TokenCount.of([tokens]),
        computed=TokenCount.of([tokens]),
        gflops=gflops,
        ms=ms,
        first_ms=0.9 * ms,
        third_ms=1.2 * ms,
        images_per_second=1,
        peak_mb=1,
        cosine=cosine,
    )


def make_report(*rows, gflops=10.0):
    base = make_row("the model itself", 100, 50.0, gflops, None)
    rows = rows or (make_row("keep=1", 100, 52.0, 10.2, 1.0), make_row("keep=0.5", 50, 30.0, 5.0))
    return BenchmarkReport(
        model="a.ViT", method="dc", batch=4, cells=100, inputs=("0: x",), precision="float32",
        compiled=False, repeats=5, warmup=1, machine=describe_machine(), memory="live tensors",
        weights_mb=1, base=base, rows=tuple(row.against(base) for row in rows),
    )  # fmt: skip


def words_of(figure):
    inside = [text.get_text() for axes in figure.axes for text in axes.texts]
    return "\n".join([*(text.get_text() for text in figure.texts), *inside])


def test_points_are_the_figures():
    costs, agreement = draw_benchmark(make_report()).axes
    flops, time = (
        next(line for line in costs.lines if line.get_marker() == marker) for marker in "so"
    )
    assert list(flops.get_xdata()) == list(time.get_xdata()) == [50, 100]
    assert list(flops.get_ydata()) == pytest.approx([0.5, 1.02])
    assert list(time.get_ydata()) == pytest.approx([0.6, 1.04])
    (bars,) = costs.collections[-1:]
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.54, 0.72))
    (cosine,) = agreement.lines
    assert list(cosine.get_ydata()) == [0.9, 1.0]


def test_words():
    words = words_of(draw_benchmark(make_report()))
    for needed in ("keep=0.5 saves 50 % of the FLOPs and 40 % of the time", "the model itself",
                   "50 ms", "eager", "torch", "30 ms", "interleaved"):  # fmt: skip
        assert needed in words, needed
    slow = make_report(make_row("keep=0.5", 50, 80.0, 5.0))
    assert "No budget saves time here" in words_of(draw_benchmark(slow))
    assert words_of(draw_benchmark(slow, title="Mine")).startswith("Mine")


def test_what_is_not_known_is_not_drawn():
    report = make_report(make_row("keep=0.5", 50, 30.0, 5.0, None), gflops=0.0)
    costs, agreement = draw_benchmark(report).axes
    assert "FLOPs" not in [text.get_text() for text in costs.get_legend().get_texts()]
    assert "cannot be compared" in agreement.texts[0].get_text()


def test_labels_of_close_points_do_not_cover_each_other(tmp_path):
    rows = [make_row(f"drop=0.{i}", 40 + i, 30.0 + i, 5.0) for i in range(3)]
    figure = draw_benchmark(make_report(*rows))
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    for i, box in enumerate(boxes):
        assert not any(box.padded(-2).overlaps(other.padded(-2)) for other in boxes[i + 1 :])
    top = figure.axes[0].get_window_extent().y1
    assert all(box.y1 <= top + 4 for box in boxes)
    assert save_figure(figure, tmp_path / "a.png").stat().st_size > 5000


def test_stacking():
    assert stack_labels([10]) == [0]
    assert stack_labels([10, 50, 51, 90]) == [0, 0, 1, 0]
