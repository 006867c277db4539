"""A look at a model before it is wrapped: what is found in it, what works, and what it costs."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from textwrap import TextWrapper
from typing import Any, get_args

import torch
from torch import nn

from adaptok.blocks import AdaptiveBlocks, find_adaptive
from adaptok.budgeted import budget
from adaptok.chunking import Layout
from adaptok.containers import BlockContainer
from adaptok.discovery import HOST
from adaptok.errors import ConfigError, UnsupportedModelError
from adaptok.hosts import Backbone, HostInputs, device_of
from adaptok.measure.latency import wait_for_device
from adaptok.probing import EntryMeter, can_probe, probe, set_submodule, undisturbed
from adaptok.registry import Kind
from adaptok.tracing import observe
from adaptok.wrapping import check_wrappable, resolve_backbone, unwrap, wrap

WIDTH = 98  # of a line of the report
SMALL = 100  # cells; with fewer of them what a wrap adds counts more than what it saves
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# How each kind of part is asked for, beside the chunker "dc".
ASKED: dict[Kind, Callable[[str], dict[str, Any]]] = {
    "router": lambda name: {"chunker": "dc", "router": name},
    "chunker": lambda name: {"chunker": name},
    "dechunker": lambda name: {"chunker": "dc", "dechunker": name},
    "stage": lambda name: {"stack": [name]},
}


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a registered part, or a layout, works in a model.

    Args:
        kind: `"layout"`, `"router"`, `"chunker"`, `"dechunker"` or `"stage"`.
        name: its name.
        reason: why it does not; empty if it does.
    """

    kind: str
    name: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Overhead:
    """What a wrap costs, and what it saves, measured in one run in turns.

    Args:
        plain_ms: milliseconds of the model itself.
        full_ms: milliseconds of the wrapped model with every cell kept and every part run.
        half_ms: milliseconds of the wrapped model with half the cells.
        repeats: turns; each figure is a median.
        batch: samples of a call.
        device: where.
    """

    plain_ms: float
    full_ms: float
    half_ms: float
    repeats: int
    batch: int
    device: str

    @property
    def ratio(self) -> float:
        """Time with every cell kept, relative to that of the model itself."""
        return self.full_ms / self.plain_ms

    @property
    def half_ratio(self) -> float:
        """Time with half the cells, relative to that of the model itself."""
        return self.half_ms / self.plain_ms


@dataclass(frozen=True, slots=True)
class Report:
    """What `doctor` found; print it, or take `to_json()`.

    Args:
        model: class of the model.
        backbone: name of the adapter that fits; empty if none does.
        family: what the adapter is for.
        versions: versions of the host's package that it was checked with.
        problem: why the model cannot be wrapped; empty if it can.
        note: why nothing was tried; empty if it was.
        blocks: number of blocks.
        width: features of a token.
        containers: attribute paths of the lists of blocks.
        grid: grid of the inputs that were tried; empty if none were.
        prefix: tokens in front of the cells.
        tokens: tokens of a sample, cells and all others.
        together: whether samples that keep other cells run in one call.
        branches: order of the halves of a guided batch, where the family has one.
        fits: layouts and registered parts, and whether they work.
        error: largest difference with every cell kept, relative to the largest value.
        kept: cells that were computed of each sample at half the budget.
        overhead: measured times.
    """

    model: str
    backbone: str = ""
    family: str = ""
    versions: str = ""
    problem: str = ""
    note: str = ""
    blocks: int = 0
    width: int = 0
    containers: tuple[str, ...] = ()
    grid: tuple[int, ...] = ()
    prefix: int = 0
    tokens: int = 0
    together: bool = True
    branches: tuple[str, ...] = ()
    fits: tuple[Fit, ...] = field(default=())
    error: float | None = None
    kept: tuple[int, ...] = ()
    overhead: Overhead | None = None

    @property
    def ok(self) -> bool:
        """Whether the model can be wrapped."""
        return not self.problem

    def to_json(self) -> str:
        """Return all of it as JSON text."""
        content = asdict(self) | {"ok": self.ok}
        if self.overhead is not None:
            ratios = {"ratio": self.overhead.ratio, "half_ratio": self.overhead.half_ratio}
            content["overhead"] = content["overhead"] | ratios
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        rows = describe_host(self) + describe_fits(self.fits) + describe_figures(self)
        title = f"{self.model}: " + ("can be wrapped" if self.ok else "cannot be wrapped")
        wrapper = TextWrapper(WIDTH, subsequent_indent=" " * 14, break_on_hyphens=False)
        return "\n".join([title, *(wrapper.fill(f"  {name:<12}{text}") for name, text in rows)])


def doctor(
    model: nn.Module,
    inputs: HostInputs | None = None,
    *,
    backbone: str | Backbone = "auto",
    repeats: int = 5,
) -> Report:
    """Look at a model before it is wrapped, and leave it as it was.

    It is wrapped and unwrapped several times on inputs that its backbone makes: once for each
    layout and each registered part, and once to measure.

    Args:
        model: a Vision Transformer or Diffusion Transformer, not wrapped.
        inputs: inputs to measure with; None takes those that the backbone makes, which are small.
        backbone: as for `adaptok.wrap`.
        repeats: turns of the measurement.

    Returns:
        The report.

    Raises:
        AlreadyWrappedError: the model is wrapped.
        ConfigError: there is nothing to repeat.
        UnknownNameError: there is no backbone of that name.

    Example:
        >>> from adaptok.testing import make_vit
        >>> report = doctor(make_vit(), repeats=1)
        >>> report.backbone, report.blocks, report.grid, report.prefix, report.error
        ('timm-vit', 3, (4, 6), 1, 0.0)
        >>> print(str(report).splitlines()[0])
        timm.models.vision_transformer.VisionTransformer: can be wrapped
    """
    if repeats < 1:
        raise ConfigError(f"repeats is a number of turns of at least 1, got {repeats}")
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    try:
        check_wrappable(model)
        host = resolve_backbone(model, backbone)
    except UnsupportedModelError as error:
        return Report(name, problem=f"{error}{list_containers(model)}")
    found: dict[str, Any] = {
        "backbone": host.name,
        "family": host.family,
        "versions": host.versions,
        "blocks": host.depth,
        "width": host.width,
        "containers": host.containers,
        "together": host.positions_per_sample,
        "branches": host.branches,
    }
    if not can_probe(model):
        note = "nothing: the weights are not here (on meta, offloaded or sharded)"
        return Report(name, note=note, **found)
    with undisturbed(model), torch.no_grad():
        try:
            found |= try_wrap(model, host, inputs)
            found["fits"] = (*try_layouts(model, host), *try_parts(model, host))
            found["overhead"] = measure_overhead(model, host, inputs, repeats, len(found["kept"]))
        except Exception as error:  # a host may raise anything when it is called
            return Report(name, problem=describe_exception(error), **found)
    return Report(name, **found)


def describe_exception(error: Exception) -> str:
    """Say what went wrong, in the words of the error."""
    return str(error) or type(error).__name__


def list_containers(model: object) -> str:
    """Name the lists in a model that could be its blocks."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    paths = [
        f"{path} ({len(module)})"
        for path, module in modules
        if path and isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    ]
    return f"\nLists in this model: {', '.join(paths[:8])}" if paths else ""


@contextmanager
def wrapped(model: nn.Module, host: Backbone, **options: Any) -> Iterator[AdaptiveBlocks]:  # noqa: ANN401
    """Wrap a model for a while; the probe is the caller's."""
    share = None if set(options) == {"stack"} else 0.5  # not every stage takes a budget
    wrap(model, budget=share, backbone=host, verify=False, **options)
    try:
        blocks = find_adaptive(model)
        assert blocks is not None
        yield blocks
    finally:
        unwrap(model)


def containers_of(model: nn.Module, host: Backbone) -> dict[str, BlockContainer]:
    """Return the block lists of a wrapped model by path."""
    found = {path: model.get_submodule(path) for path in host.containers}
    return {path: part for path, part in found.items() if isinstance(part, BlockContainer)}


def try_wrap(model: nn.Module, host: Backbone, inputs: HostInputs | None) -> dict[str, Any]:
    """Wrap a model with the default chunker and see what enters its blocks."""
    meter = EntryMeter()
    with wrapped(model, host, chunker="dc") as blocks:
        seen = probe(model, blocks, containers_of(model, host))
        given = inputs or host.example(model)
        with observe(model, meter):
            model(*given.args, **given.kwargs)
    assert meter.entered is not None
    call = meter.entered
    return {
        "grid": tuple(int(length) for length in call.grid),
        "prefix": int(call.start),
        "tokens": int(call.x.shape[1]),
        "error": seen.error,
        "kept": tuple(meter.kept),
    }


def try_layouts(model: nn.Module, host: Backbone) -> Iterator[Fit]:
    """Try each layout of the default chunker."""
    for layout in LAYOUTS:
        options = {"chunker": {"name": "dc", "layout": layout}}
        yield Fit("layout", layout, try_options(model, host, options))


def try_parts(model: nn.Module, host: Backbone) -> Iterator[Fit]:
    """Try each registered part."""
    HOST.load_all()
    for kind, ask in ASKED.items():
        for name in HOST.registry.names(kind):
            yield Fit(kind, name, try_options(model, host, ask(name)))


def try_options(model: nn.Module, host: Backbone, options: dict[str, Any]) -> str:
    """Return why a wrap with some options does not work; empty if it does."""
    try:
        with wrapped(model, host, **options) as blocks:
            probe(model, blocks, containers_of(model, host))
    except Exception as error:  # a part of somebody else may raise anything
        return describe_exception(error).splitlines()[0]
    return ""


def measure_overhead(
    model: nn.Module, host: Backbone, inputs: HostInputs | None, repeats: int, batch: int
) -> Overhead:
    """Measure a model itself, wrapped with every cell kept, and with half of them, in turns."""
    times: dict[str, list[float]] = {"plain": [], "full": [], "half": []}
    with wrapped(model, host, chunker="dc") as blocks:
        given = inputs or host.example(model)
        paths = containers_of(model, host)
        for turn in range(repeats + 1):
            found = {}
            for path, container in paths.items():
                set_submodule(model, path, container.original[0])
            try:
                found["plain"] = time_call(model, given)
            finally:
                for path, container in paths.items():
                    set_submodule(model, path, container)
                blocks.handed.clear()
            for name, keep in (("full", 1.0), ("half", 0.5)):
                with budget(model, keep=keep):
                    found[name] = time_call(model, given)
            if turn > 0:  # the first turn warms up
                for name, value in found.items():
                    times[name].append(value)
    plain_ms, full_ms, half_ms = (statistics.median(values) for values in times.values())
    return Overhead(plain_ms, full_ms, half_ms, repeats, batch, str(device_of(model)))


def time_call(model: nn.Module, inputs: HostInputs) -> float:
    """Return the milliseconds of one call."""
    wait_for_device()
    start = time.perf_counter()
    model(*inputs.args, **inputs.kwargs)
    wait_for_device()
    return 1000.0 * (time.perf_counter() - start)


def describe_host(report: Report) -> list[tuple[str, str]]:
    """Return rows about what was found."""
    lines = report.problem.splitlines()
    rows = [("" if number else "problem", line) for number, line in enumerate(lines)]
    if not report.backbone:
        return rows
    rows += [
        ("backbone", f"{report.backbone}: {report.family}; checked with {report.versions}"),
        ("blocks", f"{report.blocks} of width {report.width}, in {', '.join(report.containers)}"),
    ]
    if report.grid:
        cells = math.prod(report.grid)
        behind = report.tokens - report.prefix - cells
        others = f", {behind} others behind" if behind else ""
        shape = " x ".join(map(str, report.grid))
        rows.append(("tokens", f"grid {shape} = {cells} cells, {report.prefix} in front{others}"))
    if not report.together:
        rows.append(("samples", "run one by one where they keep other cells"))
    if report.branches:
        rows.append(("guidance", f"halves of a batch: {', '.join(report.branches)}"))
    if report.note:
        rows.append(("tried", report.note))
    return rows


def describe_fits(fits: Sequence[Fit]) -> list[tuple[str, str]]:
    """Return rows about layouts and parts: those that work, and the others with their reasons."""
    rows = []
    for kind in dict.fromkeys(fit.kind for fit in fits):
        same = [fit for fit in fits if fit.kind == kind]
        works = [fit.name for fit in same if not fit.reason]
        rows.append((f"{kind}s", ", ".join(works) or "none"))
        rows += [("", f"not {fit.name}: {fit.reason}") for fit in same if fit.reason]
    return rows


def describe_figures(report: Report) -> list[tuple[str, str]]:
    """Return rows about what was measured."""
    rows = []
    if report.error is not None:
        rows.append(("identity", f"error {report.error:.2g} with every cell kept"))
    if report.kept:
        rows.append(("at keep=0.5", f"{', '.join(map(str, report.kept))} cells computed"))
    cost = report.overhead
    if cost is not None:
        rows += [
            ("all kept", f"{cost.ratio:.2f} x the time, {cost.full_ms:.1f} ms"),
            ("half kept", f"{cost.half_ratio:.2f} x the time, {cost.half_ms:.1f} ms"),
            (
                "measured",
                f"{cost.plain_ms:.1f} ms unwrapped; batch {cost.batch}, {cost.device}, medians of "
                f"{cost.repeats} in turns",
            ),
        ]
        if math.prod(report.grid) < SMALL:
            rows.append(("", "on a small grid: give inputs= of your own for figures that count"))
    return rows
