"""The work of `adaptok sample --output FILE.npz`: many samples, in several processes."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.table import Table

from adaptok.cli.autoencoders import open_decoder
from adaptok.cli.drawing import DEFAULT_STEPS, FAST_SCHEDULER, SampleOptions, choose_device
from adaptok.cli.opening import open_trained
from adaptok.cli.pictures import objective_of, read_label
from adaptok.cli.terminal import Bar, describe_seconds, err, out, show_progress
from adaptok.dc.baseline import refuse_budget
from adaptok.dc.config import DiTConfig
from adaptok.errors import ConfigError
from adaptok.train.batches import Share
from adaptok.train.processes import Processes
from adaptok.train.sample_plan import SamplePlan
from adaptok.train.sample_store import SampleStore
from adaptok.train.sampling_run import (
    Painter,
    SampleProgress,
    SamplingSummary,
    check_crew,
    draw_to_file,
    hash_model,
)

BATCH = 32
SILENCE = 30.0  # seconds between two lines outside of a terminal


@dataclass(frozen=True, slots=True)
class Crew:
    """This process among all.

    Args:
        device: where it computes.
        share: which process it is.
        meet: returns when all have called it.
    """

    device: torch.device
    share: Share = field(default_factory=Share)
    meet: Callable[[], object] = lambda: None


def draw_many(options: SampleOptions) -> None:
    """Draw many samples into one file, and print what they cost.

    Args:
        options: what a person asked for.

    Raises:
        AdaptokError: an option does not fit the model, or a file cannot be written.
    """
    words = options.describe_budget()  # refuses a wrong budget before anything is loaded
    crew = join_crew(options.device)
    out.quiet = crew.share.rank != 0  # of several processes the first one speaks
    painter = make_painter(options, crew.device)
    plan, store = painter.plan, SampleStore(options.output, painter.plan)
    batch = options.batch or BATCH
    check_crew(plan, batch, crew.share)
    store.check()
    there = store.count_drawn()
    out.print(
        f"{plan.count:,} images of {plan.width}x{plan.height} px, {len(plan.labels)} "
        f"class{'es' if len(plan.labels) > 1 else ''} {plan.classes}; {plan.scheduler}, "
        f"{plan.steps} steps, {words}; {crew.share.ranks} x {crew.device.type}, output in "
        f"{options.output}" + (f"; {there:,} are there" if there else ""),
        soft_wrap=True,
    )
    idle = crew.share.ranks - -(-(plan.count - there) // batch)
    if idle > 0:
        out.print(
            f"{idle} of {crew.share.ranks} processes have nothing to draw in batches of {batch}: "
            "a smaller --batch gives each a share",
            soft_wrap=True,
        )
    with show_progress("drawing", plan.count - there) as bar:
        teller = Teller(bar)
        try:
            summary = draw_to_file(
                painter,
                store,
                batch=batch,
                share=crew.share,
                meet=crew.meet,
                on_progress=teller.tell,
            )
        except KeyboardInterrupt:
            if crew.share.rank == 0 and store.folder.is_dir():
                err.print(
                    f"{store.count_drawn():,} of {plan.count:,} images are drawn: run the same "
                    "command again to go on",
                    soft_wrap=True,
                )
            raise
    if summary is not None:
        report_many(summary, words, crew)


def join_crew(device: str | None) -> Crew:
    """Join the other processes, if a launcher started several.

    Args:
        device: what a person asked for.

    Returns:
        Device and share of this process.

    Raises:
        ConfigError: a device was asked for where the launcher gives them out.
        DeviceError: there is no such device.
        MissingPackageError: there are several processes, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Crew(choose_device(device))
    if device is not None:
        raise ConfigError(
            f"several processes get their devices from the launcher, and --device {device} came: "
            "leave it out (ACCELERATE_USE_CPU=true is for CPUs)"
        )
    processes = Processes.start()
    return Crew(processes.device, processes.share, lambda: processes.agree(False))


def make_painter(options: SampleOptions, device: torch.device) -> Painter:
    """Load a model and settle what it draws.

    Args:
        options: what a person asked for.
        device: where it computes.

    Returns:
        The model with its plan.

    Raises:
        AdaptokError: an option does not fit the model.
    """
    trained = open_trained(options.model)
    if isinstance(trained.model.config, DiTConfig):
        refuse_budget(options.drop, options.keep, options.tokens)
    objective = objective_of(trained.card)
    decoder = open_decoder(trained, device, options.vae)
    height, width = decoder.size(trained.model.config.grid)
    scheduler = options.scheduler or FAST_SCHEDULER[trained.card.objective]
    labels = tuple(read_label(text, trained) for text in options.labels)
    plan = SamplePlan(
        model=options.model,
        weights=hash_model(trained, objective),
        count=options.count,
        seed=options.seed,
        labels=labels or tuple(range(trained.model.config.num_classes)),
        classes=options.classes or "balanced",
        scheduler=scheduler,
        steps=options.steps or DEFAULT_STEPS.get(scheduler, 50),
        guidance=options.guidance,
        drop=options.drop,
        keep=options.keep,
        tokens=options.tokens,
        uncond_drop=options.uncond_drop,
        precision=options.precision or "no",
        height=height,
        width=width,
        decoder=decoder.weights,
    )
    trained.model.to(device)
    return Painter(trained.model, plan, objective, decoder)


class Teller:
    """Shows how a run stands: a bar, or outside of a terminal a line now and then.

    Args:
        bar: the bar.
    """

    def __init__(self, bar: Bar) -> None:
        self.bar = bar
        self.spoke = 0.0

    def tell(self, now: SampleProgress) -> None:
        """Show it."""
        note = f"{now.images_per_second:.3g} images/s"
        self.bar.move_to(now.drawn - now.before, now.count - now.before, note)
        is_time = now.seconds - self.spoke >= SILENCE or now.drawn == now.count
        if err.is_terminal or not is_time or now.seconds_left is None:
            return
        self.spoke = now.seconds
        left = describe_seconds(now.seconds_left)
        out.print(f"image {now.drawn:,}/{now.count:,}  {note}  {left} left", soft_wrap=True)


def report_many(summary: SamplingSummary, words: str, crew: Crew) -> None:
    """Print what the images cost and where they are."""
    now, cost = summary.progress, summary.cost
    if cost is not None:
        table = Table(title="Cost of one image")
        for column in ("budget", "tokens a step", "ms in all"):
            table.add_column(column, justify="left" if column == "budget" else "right")
        table.add_row(words, f"{cost.tokens:,.1f}", f"{1000 * cost.seconds:,.0f}")
        out.print(table)
    drawn = now.drawn - now.before
    if drawn:
        each = "process" if summary.processes == 1 else "processes"
        out.print(
            f"{drawn:,} images in {describe_seconds(now.seconds)}, "
            f"{now.images_per_second:.3g} images/s by {summary.processes} {each} on "
            f"{crew.device.type}",
            soft_wrap=True,
        )
    out.print(
        f"images: {summary.output} ({now.count:,} in arr_0, classes in arr_1)", soft_wrap=True
    )
