"""Reports: what they say, and the trip through JSON."""

import json

import pytest

from adaptok.errors import ConfigError, StorageError
from adaptok.measure import BenchmarkReport, BenchmarkRow, TokenCount, describe_machine


def make_row(name, ms, gflops, *, tokens=10, spread=0.05, **options):
    counts = TokenCount.of([tokens, tokens + 2])
    return BenchmarkRow(
        name=name,
        requested=counts,
        computed=counts,
        gflops=gflops,
        ms=ms,
        first_ms=ms * (1 - spread),
        third_ms=ms * (1 + spread),
        images_per_second=2000 / ms,
        peak_mb=ms / 10,
        **options,
    )


def make_report(*rows, **options):
    base = make_row("plain", 100.0, 50.0, tokens=30)
    rows = rows or (
        make_row("keep=1", 104.0, 50.4, cosine=1.0, relative_error=0.0),
        make_row("keep=0.5", 60.0, 25.0, tokens=15, cosine=0.9, relative_error=0.2),
        make_row("keep=0.3", 140.0, 15.0, tokens=9, cosine=0.5, relative_error=0.6),
    )
    return BenchmarkReport(
        **{
            "model": "timm.ViT",
            "method": "chunker 'dc'",
            "batch": 2,
            "cells": 32,
            "inputs": ("0: float32 (2, 3, 32, 64)",),
            "precision": "float32",
            "compiled": False,
            "repeats": 10,
            "warmup": 2,
            "machine": describe_machine(),
            "memory": "live tensors",
            "weights_mb": 12.5,
            "base": base,
            "rows": tuple(row.against(base) for row in rows),
        }
        | options
    )


class TestSentence:
    def test_what_pays_and_what_does_not(self):
        assert make_report().sentence == (
            "keep=1 takes 1 % more FLOPs without a clear change in time (+4 %, within the spread); "
            "keep=0.5 saves 50 % of the FLOPs and 40 % of the time; "
            "keep=0.3 saves 70 % of the FLOPs but is 40 % SLOWER than the baseline."
        )

    @pytest.mark.parametrize(
        ("ms", "gflops", "said"),
        [
            (150, 50, "b saves no FLOPs and is 50 % SLOWER than the baseline."),
            (150, 60, "b takes 20 % more FLOPs and is 50 % SLOWER than the baseline."),
            (50, 60, "b takes 20 % more FLOPs but saves 50 % of the time."),
            (50, 50, "b saves no FLOPs and 50 % of the time."),
        ],
    )
    def test_odd_cases(self, ms, gflops, said):
        assert make_report(make_row("b", ms, gflops)).sentence == said

    def test_noise_is_neither_faster_nor_slower(self):
        for ms in (85.0, 118.0):
            said = make_report(make_row("b", ms, 25.0, spread=0.2)).sentence
            assert "without a clear change in time" in said
            assert "SLOWER" not in said


class TestSavings:
    def test_payoff(self):
        base = make_row("plain", 100.0, 50.0)
        row = make_row("b", 60.0, 25.0).against(base)
        assert (row.saved_flops, row.saved_time) == pytest.approx((0.5, 0.4))
        assert row.payoff == pytest.approx(0.8)
        assert make_row("b", 110.0, 25.0).against(base).payoff == pytest.approx(-0.2)
        assert make_row("b", 60.0, 49.9).against(base).payoff is None

    def test_without_known_operations(self):
        row = make_row("b", 60.0, 25.0).against(make_row("plain", 100.0, 0.0))
        assert row.saved_flops is None
        assert row.payoff is None
        assert row.saved_time == pytest.approx(0.4)


class TestText:
    def test_everything_a_reader_needs(self):
        text = str(make_report())
        for needed in ("batch 2", "32 cells", "float32 (2, 3, 32, 64)", "eager", "torch",
                       "thread", "10 interleaved rounds", "live tensors", "11.0 (10 to 12)",
                       "12.5 MB of weights", "keep=0.5 saves 50 %"):  # fmt: skip
            assert needed in text, needed
        assert "compiled" in str(make_report(compiled=True))
        assert "allocator" in str(make_report(memory="allocator"))

    def test_columns_line_up(self):
        lines = str(make_report()).splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("budget"))
        table = lines[start : start + 5]
        assert [line.split()[0] for line in table[1:]] == [
            "baseline",
            "keep=1",
            "keep=0.5",
            "keep=0.3",
        ]
        assert len({len(line) for line in table if "-  " not in line[-4:]}) <= 2
        assert table[0].index("GFLOPs") + 6 == table[2].index("50.4") + 4

    def test_never_operations_without_time(self):
        head = make_report().markdown().splitlines()[0]
        assert "GFLOPs | ms |" in head
        assert "saved FLOPs | saved time |" in head

    def test_markdown(self):
        lines = make_report().markdown().splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) == 2 + 4
        assert lines[1].startswith("| --- | ---: |")

    def test_asked_for_only_where_it_differs(self):
        assert "asked for" not in str(make_report())
        filled = make_row("b", 60.0, 25.0).model_copy(update={"requested": TokenCount.of([7, 8])})
        text = str(make_report(filled))
        assert "asked for" in text
        assert "7.5 (7 to 8)" in text


class TestFile:
    def test_through_a_file(self, tmp_path):
        report = make_report()
        report.save(tmp_path / "report.json")
        assert BenchmarkReport.load(tmp_path / "report.json") == report
        content = json.loads((tmp_path / "report.json").read_text())
        assert content["rows"][1]["payoff"] == pytest.approx(0.8)
        assert content["machine"]["threads"] >= 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, "up to version 1: install a newer adaptok"),
            ({"version": 0}, "up to version 1"),
            ({"colour": "blue"}, "colour: this option does not exist"),
            ({"rows": []}, "rows"),
            ({"batch": "many"}, "batch"),
        ],
    )
    def test_other_content_is_refused(self, tmp_path, change, message):
        content = json.loads(make_report().to_json()) | change
        (tmp_path / "report.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            BenchmarkReport.load(tmp_path / "report.json")

    def test_unknown_keys_inside(self, tmp_path):
        content = json.loads(make_report().to_json())
        content["rows"][0]["speed"] = 3
        (tmp_path / "report.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="speed"):
            BenchmarkReport.load(tmp_path / "report.json")

    def test_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot read"):
            BenchmarkReport.load(tmp_path / "none.json")
        with pytest.raises(StorageError, match="cannot write"):
            make_report().save(tmp_path / "no" / "such" / "folder.json")


def test_reports_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        make_report().batch = 3
