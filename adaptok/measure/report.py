"""What a benchmark found, as values: tokens, operations, time, memory, agreement."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator

from adaptok.config import Config
from adaptok.measure.machine import Machine

VERSION = 1
# With less saved than this, time saved per operation saved is a ratio of two roundings.
LEAST_SAVING = 0.01


class TokenCount(Config):
    """Tokens of the samples of a call.

    Args:
        mean: over the samples.
        least: of one sample.
        most: of one sample.
    """

    mean: float
    least: int
    most: int

    @classmethod
    def of(cls, counts: Sequence[int]) -> Self:
        """Return mean and extremes of the counts of all samples."""
        return cls(mean=statistics.fmean(counts), least=min(counts), most=max(counts))

    def __str__(self) -> str:
        if self.least == self.most:
            return str(self.least)
        return f"{self.mean:.1f} ({self.least} to {self.most})"


class BenchmarkRow(Config):
    """One budget, or the baseline, and what a call of the whole batch costs.

    Args:
        name: the budget in words, or what the baseline is.
        requested: grid tokens that the budget asked for; None where that is not known.
        computed: grid tokens that really ran: a layout may round up.
        gflops: counted while an uncompiled call ran, by its real lengths: matrix products,
            convolutions and attention, 10^9 operations.
        formula_gflops: the same call by the closed form for a DCDiT, norms and elementwise work
            included (`adaptok.measure.count_flops`).
        ms: median of the measured milliseconds.
        first_ms: first quartile.
        third_ms: third quartile.
        images_per_second: samples of a call by its median time.
        peak_mb: memory that a call holds at most beyond weights and inputs, 10^6 bytes.
        cosine: of the outputs with those of the baseline, mean over the samples; both centred over
            the batch where there is one. None for the baseline, and where outputs have no
            common shape or do not vary.
        relative_error: length of the difference to the baseline's outputs by their length.
        saved_flops: share of the baseline's operations; negative where it takes more.
        saved_time: share of the baseline's median time; negative where it is slower.
        payoff: time saved by operations saved; None where hardly any operations are saved.
    """

    name: str
    requested: TokenCount | None = None
    computed: TokenCount | None = None
    gflops: float
    formula_gflops: float | None = None
    ms: float
    first_ms: float
    third_ms: float
    images_per_second: float
    peak_mb: float
    cosine: float | None = None
    relative_error: float | None = None
    saved_flops: float | None = None
    saved_time: float | None = None
    payoff: float | None = None

    def against(self, base: "BenchmarkRow") -> "BenchmarkRow":
        """Return this row with what it saves, measured against the baseline's.

        Args:
            base: row of the baseline.

        Returns:
            The same row with its savings.

        Example:
            >>> cost = {"ms": 10, "first_ms": 9, "third_ms": 11, "images_per_second": 1}
            >>> base = BenchmarkRow(name="plain", gflops=100, peak_mb=1, **cost)
            >>> row = BenchmarkRow(name="keep=0.5", gflops=50, peak_mb=1, **cost | {"ms": 6})
            >>> row.against(base).saved_flops, row.against(base).saved_time
            (0.5, 0.4)
            >>> row.against(base).payoff
            0.8
        """
        flops = 1 - self.gflops / base.gflops if base.gflops > 0 else None
        time = 1 - self.ms / base.ms if base.ms > 0 else None
        pays = flops is not None and time is not None and flops >= LEAST_SAVING
        payoff = time / flops if pays and time is not None and flops is not None else None
        return self.model_copy(update={"saved_flops": flops, "saved_time": time, "payoff": payoff})

    def is_slower(self, base: "BenchmarkRow") -> bool:
        """Say whether it is slower than the baseline, beyond the spread of both."""
        return self.first_ms > base.third_ms

    def is_faster(self, base: "BenchmarkRow") -> bool:
        """Say whether it is faster than the baseline, beyond the spread of both."""
        return self.third_ms < base.first_ms


class BenchmarkReport(Config):
    """What `adaptok.benchmark` found; print it, draw it, or keep it.

    Args:
        model: class of the model.
        method: what makes it adaptive, in words.
        batch: samples of a call.
        cells: grid cells of a sample.
        inputs: names, dtypes and shapes of the tensors of a call.
        precision: dtype of the weights, and autocast if it was on.
        compiled: whether both sides ran compiled; else both ran eager.
        repeats: measured rounds.
        warmup: rounds before that.
        machine: where.
        memory: how the peak was found: by the allocator of a GPU, or by the bytes of live tensors
            of an uncompiled call.
        weights_mb: parameters and buffers of the model, 10^6 bytes.
        base: the baseline.
        rows: one per budget, in the order in which they were given.
        version: version of this layout.

    Raises:
        ConfigError: an unknown key, a wrong value, or a newer version.
    """

    model: str
    method: str
    batch: int
    cells: int
    inputs: tuple[str, ...]
    precision: str
    compiled: bool
    repeats: int
    warmup: int
    machine: Machine
    memory: Literal["allocator", "live tensors"]
    weights_mb: float
    base: BenchmarkRow
    rows: tuple[BenchmarkRow, ...] = Field(min_length=1)
    version: int = VERSION

    @field_validator("version")
    @classmethod
    def check_version(cls, version: int) -> int:
        """Refuse what a newer adaptok wrote."""
        if not 1 <= version <= VERSION:
            raise ValueError(
                f"this adaptok reads benchmark reports up to version {VERSION}: install a newer "
                "adaptok"
            )
        return version

    def save(self, path: str | Path) -> None:
        """Write the report to a JSON file.

        Args:
            path: the file; it is replaced.

        Raises:
            StorageError: the file cannot be written.
        """
        self.to_json_file(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report from a JSON file.

        Args:
            path: a file that `save` wrote.

        Returns:
            The report.

        Raises:
            ConfigError: the file is missing or no report, has unknown keys, or is of a newer
                version.
        """
        return cls.from_json_file(path)

    @property
    def sentence(self) -> str:
        """What pays and what does not, in one sentence."""
        return "; ".join(describe_payoff(row, self.base) for row in self.rows) + "."

    def markdown(self) -> str:
        """Return the figures as a table of Markdown."""
        head, *rows = make_table(self)
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def __str__(self) -> str:
        table = make_table(self)
        widths = [max(len(line[place]) for line in table) for place in range(len(table[0]))]
        rows = [
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        return "\n".join([*describe_setting(self), "", *rows, "", self.sentence])


def describe_payoff(row: BenchmarkRow, base: BenchmarkRow) -> str:
    """Say what one budget saves, and whether it pays.

    Args:
        row: of the budget.
        base: of the baseline.

    Returns:
        Half a sentence.
    """
    flops, time = row.saved_flops, row.saved_time
    words = [row.name]
    costs_more = flops is not None and flops <= -LEAST_SAVING / 2
    if flops is None:
        words.append("has no known FLOPs to compare")
    elif costs_more:
        words.append(f"takes {percent(-flops)} more FLOPs")
    elif flops < LEAST_SAVING / 2:
        words.append("saves no FLOPs")
    else:
        words.append(f"saves {percent(flops)} of the FLOPs")
    if time is None:
        return " ".join(words)
    if row.is_slower(base):
        joint = "and" if costs_more or (flops is not None and flops < LEAST_SAVING / 2) else "but"
        words.append(f"{joint} is {percent(-time)} SLOWER than the baseline")
    elif row.is_faster(base):
        joint = "but saves" if costs_more else "and"
        words.append(f"{joint} {percent(time)} of the time")
    else:
        change = f"{-100 * time:+.0f} %, within the spread"
        words.append(f"without a clear change in time ({change})")
    return " ".join(words)


def percent(share: float) -> str:
    """Write a share as a whole percentage."""
    return f"{100 * share:.0f} %"


def describe_setting(report: BenchmarkReport) -> list[str]:
    """Say what was measured, on what and how."""
    form = "compiled" if report.compiled else "eager"
    how = f"medians of {report.repeats} interleaved rounds after {report.warmup} to warm up"
    peak = (
        "by the allocator"
        if report.memory == "allocator"
        else "bytes of live tensors in an uncompiled call"
    )
    shown = [
        ("model", f"{report.model}, {report.method}; {report.weights_mb:.1f} MB of weights"),
        ("baseline", report.base.name),
        ("inputs", f"batch {report.batch}, {report.cells} cells: {', '.join(report.inputs)}"),
        ("run", f"{form}, {report.precision}, {how}"),
        ("machine", str(report.machine)),
        ("FLOPs", "products, convolutions and attention of a whole call, by the real lengths"),
        ("peak", f"memory of a call beyond weights and inputs, {peak}"),
    ]
    return [f"{name:<10}{text}" for name, text in shown]


def make_table(report: BenchmarkReport) -> list[list[str]]:
    """Return the figures as rows of text, headings first; columns without figures are left out."""
    rows = (report.base, *report.rows)
    filled = any(row.requested != row.computed for row in rows)
    columns: list[list[str]] = [
        ["budget", *("baseline" if row is report.base else row.name for row in rows)],
        ["tokens", *(str(row.computed or "-") for row in rows)],
        ["asked for", *(str(row.requested or "-") for row in rows)] if filled else [],
        ["GFLOPs", *(f"{row.gflops:.3g}" for row in rows)],
        ["ms", *(f"{row.ms:.4g}" for row in rows)],
        ["quartiles", *(f"{row.first_ms:.4g} to {row.third_ms:.4g}" for row in rows)],
        ["images/s", *(f"{row.images_per_second:.4g}" for row in rows)],
        ["peak MB", *(f"{row.peak_mb:.4g}" for row in rows)],
        ["cosine", *(show(row.cosine, ".4f") for row in rows)],
        ["rel. error", *(show(row.relative_error, ".4f") for row in rows)],
        ["saved FLOPs", *(show(row.saved_flops, ".1%") for row in rows)],
        ["saved time", *(show(row.saved_time, ".1%") for row in rows)],
        ["time/FLOPs", *(show(row.payoff, ".2f") for row in rows)],
    ]
    return [list(line) for line in zip(*filter(None, columns), strict=True)]


def show(value: float | None, form: str) -> str:
    """Write a number, or a dash where there is none."""
    return "-" if value is None else format(value, form)
