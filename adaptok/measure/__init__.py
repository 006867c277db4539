"""What a forward pass costs: counted operations, and measured time, memory and agreement."""

from adaptok.measure.agreement import Agreement, compare_outputs
from adaptok.measure.benchmarking import benchmark
from adaptok.measure.flops import FlopCount, count_flops, count_flops_by_part
from adaptok.measure.latency import Candidate, Timing, measure_interleaved, measure_ms
from adaptok.measure.machine import Machine, describe_machine
from adaptok.measure.memory import LiveMemory, measure_peak
from adaptok.measure.planner import Applied, Plan, plan, set_aside
from adaptok.measure.report import BenchmarkReport, BenchmarkRow, TokenCount
from adaptok.measure.sampling import MeasuredSamples, StepCost, measure_sampling
from adaptok.measure.turns import StageCost
from adaptok.measure.warming import WarmCalls, WarmUp, warm_up

__all__ = [
    "Agreement",
    "Applied",
    "BenchmarkReport",
    "BenchmarkRow",
    "Candidate",
    "FlopCount",
    "LiveMemory",
    "Machine",
    "MeasuredSamples",
    "Plan",
    "StageCost",
    "StepCost",
    "Timing",
    "TokenCount",
    "WarmCalls",
    "WarmUp",
    "benchmark",
    "compare_outputs",
    "count_flops",
    "count_flops_by_part",
    "describe_machine",
    "measure_interleaved",
    "measure_ms",
    "measure_peak",
    "measure_sampling",
    "plan",
    "set_aside",
    "warm_up",
]
