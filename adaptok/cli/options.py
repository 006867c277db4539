"""Options that several commands have alike."""

from pathlib import Path
from typing import Annotated

import typer

MeasuredModel = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FOLDER",
        help="A timm name such as vit_small_patch16_224, a folder with the config.json of a "
        "model of transformers or diffusers, or a DCDiT: the name of one that ships with "
        "adaptok, or its folder.",
    ),
]
RoutedModel = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|FOLDER",
        help="A shipped model or a folder of your own; it needs a router.",
    ),
]
VisionModel = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FOLDER",
        help="A timm name such as vit_small_patch16_224, or a folder that transformers saved a "
        "vision model to.",
    ),
]
Chunker = Annotated[
    str | None, typer.Option(help="Chunker, by name. Default: dc.", show_default=False)
]
Router = Annotated[
    str | None,
    typer.Option(help="Router, by name. Default: that of the chunker.", show_default=False),
]
Autoencoder = Annotated[
    str | None,
    typer.Option(
        "--vae",
        metavar="FOLDER|NAME",
        help="The autoencoder of a model of latents. Default: where its card says.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Samples of a call.")]
Size = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Side of an image in pixels, or of a latent in cells. Default: what the model is "
        "made for.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:1. Default: a GPU if there is one.", show_default=False),
]
Dtype = Annotated[
    str, typer.Option(metavar="float32|bfloat16|float16", help="Precision of model and inputs.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of an operation. Default: PyTorch's.", show_default=False),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        help="Weights of a timm model as safetensors. Default: those that timm downloads.",
        show_default=False,
    ),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Random weights, to try the command.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Side of an image in pixels. Default: what the model was trained for.",
        show_default=False,
    ),
]
