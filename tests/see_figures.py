"""What tests of figures have in common."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg


def render(figure):
    """Return the pixels of a figure."""
    if not isinstance(figure.canvas, FigureCanvasAgg):
        FigureCanvasAgg(figure)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def texts_of(figure):
    return [text for text in figure.texts if text.get_text()]


def words_of(figure):
    """All words on a figure, also inside axes and at them."""
    inside = [text.get_text() for axes in figure.axes for text in axes.texts]
    labels = [axes.get_ylabel() for axes in figure.axes] + [a.get_xlabel() for a in figure.axes]
    return "\n".join([*(text.get_text() for text in texts_of(figure)), *inside, *labels])


def assert_tidy(figure):
    """No text leaves the figure, none lies over another, none over an image."""
    render(figure)
    renderer = figure.canvas.get_renderer()
    boxes = [
        (text.get_text(), text.get_window_extent(renderer).padded(-2)) for text in texts_of(figure)
    ]
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        boxes += [
            (text.get_text(), text.get_window_extent(renderer).padded(-2))
            for text in (axes.xaxis.label, axes.yaxis.label)
            if text.get_text()
        ]
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    images = [axes.get_window_extent() for axes in figure.axes if axes.images]
    for i, (text, box) in enumerate(boxes):
        for other, other_box in boxes[i + 1 :]:
            assert not box.overlaps(other_box), (text, other)
        for image in images:
            assert not box.overlaps(image), text
