"""`adaptok train`: train a model from images to a folder."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

MODEL, DATA, RECIPE, RUN = "Model", "Data", "Recipe", "Run"
# Written out, so that `--help` imports nothing; a test holds it against `list_paper_runs`.
CONFIG_HELP = (
    "JSON file with options, such as config.json of another run, or a published run: paper/S-256, "
    "paper/B-256, paper/L-256, paper/XL-256, paper/S-512, paper/B-512, paper/L-512, paper/XL-512; "
    "its baseline: paper/DiT-S-2-256, paper/DiT-B-2-256, paper/DiT-L-2-256, paper/DiT-XL-2-256, "
    "paper/DiT-S-2-512, paper/DiT-B-2-512, paper/DiT-L-2-512, paper/DiT-XL-2-512. Options on the "
    "command line win."
)


class Kind(StrEnum):
    """Models that can be trained."""

    DC = "dc"
    DIT = "dit"


class Size(StrEnum):
    """Published sizes."""

    S = "S"
    B = "B"
    L = "L"
    XL = "XL"


class Layout(StrEnum):
    """Ways to run kept tokens."""

    PACKED = "packed"
    BUCKETED = "bucketed"
    FIXED = "fixed"


class Goal(StrEnum):
    """What a model is trained to say."""

    HYBRID = "hybrid"
    FLOW = "flow"


class Times(StrEnum):
    """How the times of flow matching are drawn."""

    UNIFORM = "uniform"
    LOGIT_NORMAL = "logit-normal"


class Precision(StrEnum):
    """Precision of the forward pass."""

    NO = "no"
    BF16 = "bf16"
    FP16 = "fp16"


def option(
    panel: str,
    text: str,
    default: object = None,
    *names: str,
    **more: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Describe an option that is None unless a person gives it, with the default it then has."""
    shown = text if default is None else f"{text} Default: {default}."
    return typer.Option(*names, help=shown, rich_help_panel=panel, show_default=False, **more)


def train(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder of the run: checkpoints, log and the trained model."
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME", help=CONFIG_HELP, show_default=False),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh/--resume", help="Refuse to go on with a run that is in the folder."),
    ] = False,
    kind: Annotated[
        Kind | None,
        option(MODEL, "dc: DC-DiT; dit: the fixed-patch baseline.", "dc", "--model", "-m"),
    ] = None,
    scale: Annotated[Size | None, option(MODEL, "Published size.", "S")] = None,
    hidden_size: Annotated[
        int | None, option(MODEL, "Width, a multiple of 32; instead of --scale.", min=32)
    ] = None,
    depth: Annotated[int | None, option(MODEL, "Blocks; instead of --scale.", min=1)] = None,
    num_heads: Annotated[int | None, option(MODEL, "Heads; instead of --scale.", min=1)] = None,
    patch_size: Annotated[
        int | None, option(MODEL, "Side of a patch in cells, for dit only.", 2, min=1)
    ] = None,
    target: Annotated[
        float | None,
        option(MODEL, "Compression to aim at: 4 keeps one cell in four, for dc only.", 4),
    ] = None,
    dechunk_sigma: Annotated[
        float | None, option(MODEL, "Width of the smoothing in cells, for dc only.", 1)
    ] = None,
    layout: Annotated[
        Layout | None, option(MODEL, "How kept tokens are run, for dc only.", "packed")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, option(MODEL, "Less memory for more time.", "off")
    ] = None,
    data: Annotated[
        str | None,
        option(
            DATA,
            "emoji (shipped), a folder with one folder per class, an .npz file, or latents of "
            "`adaptok encode`.",
            "emoji",
            metavar="emoji|FOLDER|FILE",
        ),
    ] = None,
    image_size: Annotated[
        int | None, option(DATA, "Side of an image in pixels.", 64, min=3)
    ] = None,
    space_to_depth: Annotated[
        int | None,
        option(DATA, "Pixels per side of a cell; 1 makes each pixel a cell.", 2, min=1),
    ] = None,
    categories: Annotated[
        list[str] | None,
        option(
            DATA,
            "Train on this emoji category only; may be given several times.",
            "all",
            "--category",
        ),
    ] = None,
    skin_variants: Annotated[
        bool | None, option(DATA, "All skin tones of the emoji, or one of each.", "all")
    ] = None,
    flip: Annotated[bool | None, option(DATA, "Mirror half of the images.", "off")] = None,
    objective: Annotated[
        Goal | None,
        option(RECIPE, "hybrid: noise and variance, as DiT; flow: flow matching.", "hybrid"),
    ] = None,
    flow_times: Annotated[
        Times | None, option(RECIPE, "How the times of flow matching are drawn.", "uniform")
    ] = None,
    flow_shift: Annotated[
        float | None, option(RECIPE, "Above 1 moves the times of flow matching to noise.", 1)
    ] = None,
    steps: Annotated[int | None, option(RECIPE, "Optimiser steps.", "400,000", min=1)] = None,
    batch_size: Annotated[
        int | None, option(RECIPE, "Images per step, over all processes.", 256, min=1)
    ] = None,
    accumulation: Annotated[
        int | None, option(RECIPE, "Micro-batches per step, to save memory.", 1, min=1)
    ] = None,
    learning_rate: Annotated[
        float | None,
        option(RECIPE, "Of AdamW.", "1e-4", "--learning-rate", "--lr"),
    ] = None,
    learning_rate_warmup: Annotated[
        int | None, option(RECIPE, "Steps over which the learning rate rises.", 0, min=0)
    ] = None,
    weight_decay: Annotated[float | None, option(RECIPE, "Of AdamW.", 0, min=0)] = None,
    gradient_clip: Annotated[
        float | None, option(RECIPE, "Largest norm of the gradient.", 1)
    ] = None,
    ema_decay: Annotated[
        float | None,
        option(RECIPE, "Decay of the averaged weights, below 1.", 0.9999, "--ema", min=0, max=1),
    ] = None,
    class_dropout: Annotated[
        float | None,
        option(RECIPE, "Share of images without a class, for guidance.", 0.1, min=0, max=1),
    ] = None,
    drops: Annotated[
        list[float] | None,
        option(
            RECIPE,
            "Tail-drop fraction to train with; may be given several times.",
            "0, 0.1 ... 0.6",
            "--drop",
            min=0,
            max=1,
        ),
    ] = None,
    budget_warmup: Annotated[
        int | None, option(RECIPE, "Steps at the start without tail drop.", 5000, min=0)
    ] = None,
    ratio_weight: Annotated[
        float | None, option(RECIPE, "Weight of the ratio loss.", 0.03, min=0)
    ] = None,
    ratio_group: Annotated[
        int | None,
        option(
            RECIPE,
            "Images whose mean the ratio loss takes; more, and single images may keep more or "
            "less. Divides the images that a process sees at once.",
            16,
            min=1,
        ),
    ] = None,
    precision: Annotated[
        Precision | None, option(RUN, "no is float32; bf16 suits GPUs and new CPUs.", "no")
    ] = None,
    compile: Annotated[bool | None, option(RUN, "Compile the parts of the model.", "off")] = None,
    seed: Annotated[int | None, option(RUN, "Of everything that is drawn.", 0, min=0)] = None,
    log_every: Annotated[int | None, option(RUN, "Steps between two reports.", 50, min=1)] = None,
    checkpoint_every: Annotated[
        int | None, option(RUN, "Steps between two checkpoints.", 1000, min=1)
    ] = None,
    keep_checkpoints: Annotated[
        int | None, option(RUN, "How many checkpoints stay.", 2, min=1)
    ] = None,
    workers: Annotated[
        int | None, option(RUN, "Processes that draw batches ahead.", 0, min=0)
    ] = None,
) -> None:
    """Train a model, or go on with a run that stopped.

    The same command goes on after Ctrl-C, a crash or a kill. Channels, latent size and classes
    follow from the data. On several GPUs or machines: `accelerate launch -m adaptok train ...`

    Example: `adaptok train -o runs/first --hidden-size 160 --depth 4 --num-heads 4 --image-size 32
    --objective flow --steps 2000 --batch-size 32 --lr 3e-4 --ema 0.999`
    """
    given = {name: value for name, value in locals().items() if value not in (None, [])}
    from adaptok.cli.training import run_training

    run_training(given)
