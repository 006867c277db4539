"""The five pictures of `adaptok demo`, and its report."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from adaptok.cli.pictures import make_frames, name_label, record_inputs, to_pixels
from adaptok.cli.reporting import make_run, write_sampling
from adaptok.cli.settings import Drawn, Tour, sampling_options
from adaptok.cli.terminal import Bar, show_progress
from adaptok.dc.config import DCDiTConfig
from adaptok.dc.folder import TrainedModel
from adaptok.diffusion import denoise
from adaptok.see import (
    Denoised,
    KeptCurve,
    SampleRow,
    draw_denoised,
    draw_kept_by_time,
    draw_loss,
    draw_sample_grid,
    draw_trajectory,
    save_figure,
)
from adaptok.train.config import TrainConfig, fit_model_to_data
from adaptok.train.data import load_emoji
from adaptok.train.decoding import make_decoder
from adaptok.train.pixels import space_to_depth, to_latent
from adaptok.train.progress import StepReport
from adaptok.train.trainer import train

SHOWN_STEPS = 7
SHOWN_CLASS = "Smileys & Emotion"
REAL_IMAGES = ("Smileys & Emotion", "Food & Drink", "Animals & Nature", "Travel & Places")
REAL_NOISE = 0.6


def show_samples(tour: Tour, trained: TrainedModel, drawn: Drawn) -> Path:
    """Draw the first picture: samples by budget."""
    rows = [
        SampleRow(
            name=row.setting.name,
            images=to_pixels(row.measured.samples.latents, trained.card),
            tokens=row.measured.cost.tokens,
            gflops=row.measured.cost.gflops,
            ms=row.measured.cost.ms,
        )
        for row in drawn.rows
    ]
    figure = draw_sample_grid(rows, [name_label(label, trained.card) for label in drawn.labels])
    return save_figure(figure, tour.output / "1_samples_by_budget.png")


def show_trajectory(tour: Tour, trained: TrainedModel, drawn: Drawn) -> Path:
    """Draw the second picture: keep probabilities on the way from noise to an image."""
    names = [name_label(label, trained.card) for label in drawn.labels]
    image = names.index(SHOWN_CLASS) if SHOWN_CLASS in names else 0
    samples = drawn.rows[0].measured.samples
    frames = make_frames(samples, drawn.inputs, trained.card, image=image, count=SHOWN_STEPS)
    figure = draw_trajectory(frames, title=f"Where the model spends its tokens: {names[image]}")
    return save_figure(figure, tour.output / "2_keep_probability.png")


def show_report(tour: Tour, trained: TrainedModel, drawn: Drawn) -> Path:
    """Write the report: the same samples under each budget, step by step, cell by cell."""
    known = [name_label(label, trained.card) for label in drawn.labels]
    chosen = [known.index(name) for name in REAL_IMAGES if name in known] or [0]
    decoder = make_decoder(trained)
    runs = [
        make_run(row.setting.name, row.measured, given, trained, decoder, chosen)
        for row, given in zip(drawn.rows, drawn.given, strict=True)
        if row.setting.runs == 1
    ]
    names = [known[place] for place in chosen]
    return write_sampling(tour.output / "report.html", runs, names, Path(tour.model).name, trained)


def show_curves(tour: Tour, trained: TrainedModel, curves: Sequence[KeptCurve]) -> Path:
    """Draw the third picture: the kept fraction over the trajectory."""
    assert isinstance(trained.model.config, DCDiTConfig)
    figure = draw_kept_by_time(
        curves,
        target=1 / trained.model.config.target,
        title="How many cells the model keeps, from noise to image",
    )
    return save_figure(figure, tour.output / "3_kept_by_time.png")


def show_real_images(tour: Tour, trained: TrainedModel) -> Path:
    """Draw the fourth picture: emoji of the test split, noised and denoised."""
    card, model = trained.card, trained.model
    emoji = load_emoji(size=card.image_size or 32, split="test")
    names = [name for name in REAL_IMAGES if name in emoji.class_names]
    chosen = [emoji.labels.tolist().index(emoji.class_names.index(name)) for name in names]
    null = model.config.num_classes
    labels = [card.class_names.index(name) if name in card.class_names else null for name in names]
    originals = emoji.take(chosen)
    latents = space_to_depth(to_latent(originals), card.space_to_depth)
    with show_progress("denoising real images", tour.steps) as bar, record_inputs(model) as inputs:
        samples = denoise(
            model,
            latents,
            labels,
            start=REAL_NOISE,
            drop=0.0,
            trace=True,
            progress=bar.move_to,
            **sampling_options(tour, trained),
        )
    results = to_pixels(samples.latents, card)
    examples = []
    for place, name in enumerate(names):
        frames = make_frames(samples, inputs, card, image=place, count=2)
        examples.append(Denoised(name, originals[place], results[place], frames[0], frames[-1]))
    figure = draw_denoised(examples, title="Emoji that the model never saw, noised and denoised")
    return save_figure(figure, tour.output / "4_real_images.png")


def show_training(tour: Tour) -> tuple[list[float], Path]:
    """Train a tiny model for a moment, and draw the fifth picture: its loss.

    Args:
        tour: what a person asked for.

    Returns:
        The loss of each step, and the picture.
    """
    config = fit_model_to_data(
        TrainConfig(
            model=DCDiTConfig(hidden_size=64, depth=2, num_heads=2),
            image_size=32,
            skin_variants=False,
            objective="flow",
            steps=tour.train_steps,
            batch_size=32,
            learning_rate=1e-3,
            learning_rate_warmup=10,
            budget_warmup=tour.train_steps // 4,
            ema_decay=0.99,
            seed=tour.seed,
            log_every=1,
            checkpoint_every=tour.train_steps,
        ),
        num_classes=8,
    )
    reports: list[StepReport] = []

    def note(report: StepReport, bar: Bar) -> None:
        reports.append(report)
        bar.move_to(report.step, report.steps, f"loss {report.loss:.3f}")

    with (
        tempfile.TemporaryDirectory(prefix="adaptok-demo-") as folder,
        show_progress("training a tiny model", config.steps) as bar,
    ):
        summary = train(config, folder, on_step=lambda report: note(report, bar))
    if summary.interrupted:
        raise KeyboardInterrupt
    losses = [report.loss for report in reports]
    figure = draw_loss(
        [report.step for report in reports],
        losses,
        title="Training runs: loss of a tiny DC-DiT on the shipped emoji",
    )
    return losses, save_figure(figure, tour.output / "5_training_loss.png")
