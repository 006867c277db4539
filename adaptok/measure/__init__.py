"""What a forward pass costs: counted operations, and measured time, memory and agreement."""

from adaptok.measure.agreement import Agreement, compare_outputs
from adaptok.measure.benchmarking import benchmark
from adaptok.measure.distances import (
    Distances,
    Estimate,
    compare_features,
    frechet_distance,
    kernel_distance,
    measure_floor,
)
from adaptok.measure.extractors import FeatureExtractor, extract_features, load_extractor
from adaptok.measure.flops import FlopCount, count_flops, count_flops_by_part
from adaptok.measure.latency import Candidate, Timing, measure_interleaved, measure_ms
from adaptok.measure.machine import Machine, describe_machine
from adaptok.measure.memory import LiveMemory, measure_peak
from adaptok.measure.paired import PairedDistances, compare_pairs
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
    "Distances",
    "Estimate",
    "FeatureExtractor",
    "FlopCount",
    "LiveMemory",
    "Machine",
    "MeasuredSamples",
    "PairedDistances",
    "Plan",
    "StageCost",
    "StepCost",
    "Timing",
    "TokenCount",
    "WarmCalls",
    "WarmUp",
    "benchmark",
    "compare_features",
    "compare_outputs",
    "compare_pairs",
    "count_flops",
    "count_flops_by_part",
    "describe_machine",
    "extract_features",
    "frechet_distance",
    "kernel_distance",
    "load_extractor",
    "measure_floor",
    "measure_interleaved",
    "measure_ms",
    "measure_peak",
    "measure_sampling",
    "plan",
    "set_aside",
    "warm_up",
]
