"""Pictures: functions that take values and return a matplotlib figure.

One line from a trace to a picture: `adaptok.see.show_tokens(trace, image)`. Functions whose names
begin with `show` take what the library gives (a trace, a wrapped model, a benchmark), those that
begin with `draw` take values of this package. Nothing here touches pyplot's global state; a figure
is shown by a notebook, or written with `save_figure`.
"""

from adaptok.see.benchmarks import draw_benchmark
from adaptok.see.budget_curves import CostCurve, CostPoint, show_budgets
from adaptok.see.canvas import save_figure
from adaptok.see.curves import KeptCurve, draw_kept_by_time, draw_loss
from adaptok.see.depths import show_depths, show_reuse
from adaptok.see.gallery import Exhibit, draw_gallery, find_exhibits, show_gallery
from adaptok.see.maps import Denoised, Frame, draw_denoised, draw_trajectory, shade_dropped
from adaptok.see.panels import Panel, PanelRow, draw_panel_rows
from adaptok.see.report import write_report, write_runs
from adaptok.see.report_runs import ReportRun, ReportStep
from adaptok.see.samples import SampleRow, draw_sample_grid
from adaptok.see.stack_diagram import show_stack
from adaptok.see.strips import show_trajectory
from adaptok.see.token_maps import show_sites, show_tokens

__all__ = [
    "CostCurve",
    "CostPoint",
    "Denoised",
    "Exhibit",
    "Frame",
    "KeptCurve",
    "Panel",
    "PanelRow",
    "ReportRun",
    "ReportStep",
    "SampleRow",
    "draw_benchmark",
    "draw_denoised",
    "draw_gallery",
    "draw_kept_by_time",
    "draw_loss",
    "draw_panel_rows",
    "draw_sample_grid",
    "draw_trajectory",
    "find_exhibits",
    "save_figure",
    "shade_dropped",
    "show_budgets",
    "show_depths",
    "show_gallery",
    "show_reuse",
    "show_sites",
    "show_stack",
    "show_tokens",
    "show_trajectory",
    "write_report",
    "write_runs",
]
