"""The clock, on a clock that we hold."""

from contextlib import contextmanager

import pytest
import torch

from adaptok.errors import ConfigError
from adaptok.measure import Candidate, Timing, latency, measure_interleaved, measure_ms


def test_median_and_quartiles_of_known_times(monkeypatch):
    ticks = iter([0.0, 0.001, 1.0, 1.002, 2.0, 2.003, 3.0, 3.004, 4.0, 4.100])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    calls = []
    timing = measure_ms(lambda: calls.append(1), repeats=5, warmup=3)
    assert timing.median_ms == pytest.approx(3.0)
    assert timing.first_ms == pytest.approx(2.0)
    assert timing.third_ms == pytest.approx(4.0)
    assert timing.spread == pytest.approx((4 - 2) / 3)
    assert len(calls) == 8


def test_one_repeat_has_no_spread():
    assert measure_ms(lambda: None, repeats=1, warmup=0).spread == 0.0
    assert Timing(0.0, 0.0, 0.0).spread == 0.0


def test_candidates_take_turns():
    calls, told = [], []
    names = ("a", "b", "c")
    timings = measure_interleaved(
        {name: lambda name=name: calls.append(name) for name in names},
        repeats=3,
        warmup=2,
        progress=lambda *steps: told.append(steps),
    )
    assert calls == [*names] * 5
    assert tuple(timings) == names
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_warm_up_is_not_counted(monkeypatch):
    # two candidates, one round to warm up (slow), two rounds of 1 and 3 ms, 2 and 4 ms
    lengths = [5.0, 5.0, 0.001, 0.002, 0.003, 0.004]
    ticks = iter([tick for length in lengths for tick in (0.0, length)])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    timings = measure_interleaved({"a": int, "b": int}, repeats=2, warmup=1)
    assert timings["a"].median_ms == pytest.approx(2.0)
    assert timings["b"].median_ms == pytest.approx(3.0)


def test_what_is_around_a_call_is_not_on_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    order = []

    def spend(seconds, name):
        now[0] += seconds
        order.append(name)

    @contextmanager
    def around():
        spend(1.0, "enter")
        yield
        spend(1.0, "leave")

    candidate = Candidate(lambda: spend(0.002, "call"), around)
    timings = measure_interleaved({"one": candidate}, repeats=2, warmup=0)
    assert timings["one"].median_ms == pytest.approx(2.0)
    assert order == ["enter", "call", "leave"] * 2


def test_another_device_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    latency.time_call(int, torch.device("cpu"))
    assert waited == []
    latency.time_call(int, torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")] * 2


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_bad_input(options):
    with pytest.raises(ConfigError, match="repeats >= 1 and warmup >= 0"):
        measure_ms(int, **options)
    with pytest.raises(ConfigError, match="repeats >= 1 and warmup >= 0"):
        measure_interleaved({"a": int}, **options)
