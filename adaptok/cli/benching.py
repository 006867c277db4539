"""The work of `adaptok bench`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from adaptok.blocks import find_adaptive
from adaptok.budgets import AMOUNTS
from adaptok.cli.building import build_model
from adaptok.cli.drawing import choose_device
from adaptok.cli.opening import is_reference, open_trained
from adaptok.cli.terminal import out, show_progress
from adaptok.dc.config import DCDiTConfig
from adaptok.dc.model import DCDiT
from adaptok.errors import AdaptokError, BudgetError, ConfigError, DtypeError
from adaptok.hosts import HostInputs
from adaptok.measure import BenchmarkReport, benchmark
from adaptok.measure.benchmarking import BUDGETS
from adaptok.measure.subjects import BUDGET_NAMES, read_budgets
from adaptok.optional import import_optional
from adaptok.tracing import plain
from adaptok.wrapping import wrap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STDOUT = Path("-")
IMAGE_AXES = 4


@dataclass(frozen=True, slots=True)
class Measuring:
    """Which model a person wants measured, and how; see `adaptok bench --help`."""

    model: str
    chunker: str | None = None
    router: str | None = None
    batch: int = 8
    size: int | None = None
    device: str | None = None
    dtype: str = "float32"
    compile: bool = False
    repeats: int = 10
    threads: int | None = None
    json: Path | None = None

    def check_dtype(self) -> None:
        """Raise a `DtypeError` unless the precision is known."""
        if self.dtype not in DTYPES:
            raise DtypeError(f"--dtype is one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True, slots=True)
class Benching(Measuring):
    """What a person asked for; see `adaptok bench --help`."""

    budgets: tuple[str, ...] = ()
    plot: Path | None = None


def run_bench(asked: Benching) -> None:
    """Measure as a person asked on the command line.

    Args:
        asked: the options.

    Raises:
        AdaptokError: an option is wrong, or the model does not run with it.
    """
    budgets = [read_budget_option(text) for text in asked.budgets] or list(BUDGETS)
    read_budgets(budgets)  # refuses what is out of range before anything is made
    asked.check_dtype()
    if asked.plot is not None:
        import_optional("matplotlib", extra="see")
    device = choose_device(asked.device)
    with limit_threads(asked.threads), naming_package():
        model, inputs = open_model(asked, device)
        with show_progress("measuring", 1) as bar:
            report = benchmark(
                model,
                inputs,
                budgets,
                repeats=asked.repeats,
                compile=asked.compile,
                progress=bar.move_to,
            )
    show_report(report, asked)


def show_report(report: BenchmarkReport, asked: Benching) -> None:
    """Print a report, and write the files that were asked for."""
    if asked.json == STDOUT:
        typer.echo(report.to_json())
    else:
        typer.echo(str(report))  # as text, without markup or wrapping
    if asked.json is not None and asked.json != STDOUT:
        report.save(asked.json)
        out.print(f"report: {asked.json}", soft_wrap=True)
    if asked.plot is not None:
        from adaptok.see import draw_benchmark, save_figure

        path = save_figure(draw_benchmark(report), asked.plot)
        if asked.json != STDOUT:
            out.print(f"plot:   {path}", soft_wrap=True)


@contextmanager
def naming_package() -> Iterator[None]:
    """Say in one sentence which package a model misses."""
    try:
        yield
    except AdaptokError:
        raise
    except ImportError as error:
        raise ConfigError(f"the model needs a package that is missing here: {error}") from error


def read_budget_option(text: str) -> float | dict[str, float]:
    """Return a budget from the words of a person.

    Args:
        text: such as `"0.5"`, `"tokens=98"`, `"drop=0,uncond_drop=0.9"` or `"natural"`.

    Returns:
        What `adaptok.benchmark` takes.

    Raises:
        BudgetError: the words mean no budget.

    Example:
        >>> read_budget_option("0.5"), read_budget_option("drop=0,uncond_drop=0.9")
        (0.5, {'drop': 0.0, 'uncond_drop': 0.9})
    """
    if text.strip() == "natural":
        return {}
    options: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = part.partition("=")
        name, value = (name.strip(), value.strip()) if sign else (AMOUNTS[0], name.strip())
        try:
            number = float(value)
        except ValueError:
            number = None
        if number is None or name not in BUDGET_NAMES or name in options:
            raise BudgetError(
                f"{text!r} is no budget: give 0.5, keep=0.5, tokens=98, drop=0.3, "
                "drop=0,uncond_drop=0.9 or natural"
            )
        options[name] = int(number) if number == int(number) and name == "tokens" else number
    return options["keep"] if list(options) == ["keep"] else options


@contextmanager
def limit_threads(threads: int | None) -> Iterator[None]:
    """Let PyTorch use so many threads for a while; None leaves it alone."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def open_model(asked: Measuring, device: torch.device) -> tuple[nn.Module, HostInputs]:
    """Make the model that a person named, wrapped where it is a host, and its inputs.

    Args:
        asked: the options.
        device: where it shall run.

    Returns:
        The model and what it is called with.

    Raises:
        AdaptokError: there is no such model, or it does not run with these options.
    """
    dtype = DTYPES[asked.dtype]
    if is_reference(asked.model):
        return open_reference(asked, device, dtype)
    model = build_model(asked.model)
    default = native_size(model)
    resize: Any = getattr(model, "set_input_size", None)  # timm: makes new position codes
    if resize is not None and asked.size not in (None, default):
        with naming_size(asked.size):
            resize(img_size=(asked.size, asked.size))
    model = model.to(device, dtype)
    wrap(model, chunker=asked.chunker or "dc", router=asked.router, budget=1.0)
    blocks = find_adaptive(model)
    assert blocks is not None
    example = blocks.backbone.example(model)
    size = asked.size or default
    inputs = enlarge_inputs(example, asked.batch, size, given=asked.size is not None)
    if asked.size is not None:
        with naming_size(asked.size), torch.no_grad(), plain(model):
            model(*inputs.args, **inputs.kwargs)
    return model, inputs


@contextmanager
def naming_size(size: int | None) -> Iterator[None]:
    """Turn what a host says to a size that does not fit into one sentence.

    Hosts check sizes by whatever comes to hand, so this is for calls of the host alone.
    """
    try:
        yield
    except (AdaptokError, torch.OutOfMemoryError):
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        said = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ConfigError(f"the model does not run with --size {size}: {said}") from error


def open_reference(
    asked: Measuring, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, HostInputs]:
    """Load a trained DCDiT, with noise, times and labels in turn."""
    trained = open_trained(asked.model)
    config = trained.model.config
    if not isinstance(trained.model, DCDiT) or not isinstance(config, DCDiTConfig):
        raise ConfigError(f"{asked.model} is a fixed-patch DiT: it has no tokens to save")
    if asked.chunker is not None or asked.router is not None:
        raise ConfigError("a DCDiT has its own chunker and router: leave these options out")
    grid = config.grid if asked.size is None else (asked.size, asked.size)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(asked.batch, config.in_channels, *grid, generator=generator)
    t = torch.linspace(50, 950, asked.batch)
    y = torch.arange(asked.batch) % config.num_classes
    model = trained.model.to(device, dtype)
    return model, HostInputs((x.to(device, dtype), t.to(device), y.to(device)))


def native_size(model: nn.Module) -> int | None:
    """Return the side of the images or latents that a host is made for, where it says so."""
    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", None)
    known = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(vision, "image_size", None),
        getattr(config, "image_size", None),
        getattr(config, "sample_size", None),
    )
    for size in known:
        side = size[-1] if isinstance(size, tuple | list) and size else size
        if isinstance(side, int):
            return side
    return None


def enlarge_inputs(
    example: HostInputs, batch: int, size: int | None, *, given: bool = True
) -> HostInputs:
    """Return inputs like those of a backbone's example, for a batch and a size.

    Args:
        example: inputs of two samples.
        batch: samples.
        size: side of the image or latent; None keeps that of the example.
        given: whether a person asked for this size; if not, what has no image stays as it is.

    Returns:
        The inputs; the image is noise that differs from sample to sample.

    Raises:
        ConfigError: there is no image to resize.

    Example:
        >>> inputs = enlarge_inputs(HostInputs((torch.ones(2, 3, 8, 8), [1, 2])), 3, 16)
        >>> inputs.args[0].shape, inputs.args[1]
        (torch.Size([3, 3, 16, 16]), [1, 2, 1])
    """
    values = [*example.args, *example.kwargs.values()]
    image = next((value for value in values if is_image(value)), None)
    if image is None and size is not None and given:
        raise ConfigError(
            "this host takes no image or latent (b c h w) whose size could be set: leave --size "
            "out, or call adaptok.benchmark with inputs of your own"
        )

    def enlarge(value: Any) -> Any:  # noqa: ANN401
        if value is image and image is not None:
            return draw_noise(image, batch, size)
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == 2:
            return value[torch.arange(batch, device=value.device) % 2]
        if isinstance(value, list) and len(value) == 2:
            return [value[sample % 2] for sample in range(batch)]
        return value

    kwargs = {name: enlarge(value) for name, value in example.kwargs.items()}
    return HostInputs(tuple(enlarge(value) for value in example.args), kwargs)


def is_image(value: object) -> bool:
    """Say whether an argument is a batch of images or latents."""
    return isinstance(value, Tensor) and value.ndim == IMAGE_AXES and value.is_floating_point()


def draw_noise(like: Tensor, batch: int, size: int | None) -> Tensor:
    """Return noise of the channels, dtype and device of an image."""
    h, w = like.shape[2:] if size is None else (size, size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, like.shape[1], h, w, generator=generator)
    return noise.to(like.device, like.dtype)
