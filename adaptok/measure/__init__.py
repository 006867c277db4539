"""What a forward pass costs: counted floating-point operations, and measured milliseconds."""

from adaptok.measure.flops import FlopCount, count_flops, count_flops_by_part
from adaptok.measure.latency import Timing, measure_interleaved, measure_ms
from adaptok.measure.sampling import MeasuredSamples, StepCost, measure_sampling

__all__ = [
    "FlopCount",
    "MeasuredSamples",
    "StepCost",
    "Timing",
    "count_flops",
    "count_flops_by_part",
    "measure_interleaved",
    "measure_ms",
    "measure_sampling",
]
