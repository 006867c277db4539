"""The clock, on a clock that we hold."""

import pytest

from adaptok.errors import ConfigError
from adaptok.measure import latency, measure_ms


def test_median_and_spread_of_known_times(monkeypatch):
    ticks = iter([0.0, 0.001, 1.0, 1.002, 2.0, 2.003, 3.0, 3.004, 4.0, 4.100])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    calls = []
    timing = measure_ms(lambda: calls.append(1), repeats=5, warmup=3)
    assert timing.median_ms == pytest.approx(3.0)
    assert timing.spread == pytest.approx((4 - 2) / 3)
    assert len(calls) == 8


def test_one_repeat_has_no_spread():
    assert measure_ms(lambda: None, repeats=1, warmup=0).spread == 0.0


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_bad_input(options):
    with pytest.raises(ConfigError, match="repeats >= 1 and warmup >= 0"):
        measure_ms(lambda: None, **options)
