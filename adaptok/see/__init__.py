"""Pictures: functions that take values and return a matplotlib figure.

Nothing here touches pyplot's global state; a figure is shown by a notebook, or written with
`save_figure`.
"""

from adaptok.see.benchmarks import draw_benchmark
from adaptok.see.canvas import save_figure
from adaptok.see.curves import KeptCurve, draw_kept_by_time, draw_loss
from adaptok.see.maps import Denoised, Frame, draw_denoised, draw_trajectory, shade_dropped
from adaptok.see.samples import SampleRow, draw_sample_grid

__all__ = [
    "Denoised",
    "Frame",
    "KeptCurve",
    "SampleRow",
    "draw_benchmark",
    "draw_denoised",
    "draw_kept_by_time",
    "draw_loss",
    "draw_sample_grid",
    "draw_trajectory",
    "save_figure",
    "shade_dropped",
]
