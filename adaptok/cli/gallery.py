"""`adaptok gallery`: what every installed method keeps of the same images."""

from pathlib import Path
from typing import Annotated

import typer


def gallery(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf."),
    ] = Path("gallery.png"),
    emoji: Annotated[
        list[str] | None,
        typer.Option(
            "--emoji",
            "-e",
            metavar="NAME",
            help="A shipped emoji; give it several times for several. Default: four of them.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            "-i",
            metavar="FILE",
            help="An image file of your own, of which the central square is taken; give it several "
            "times for several. At most six images in all.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        float, typer.Option(metavar="0..1", help="Share of the cells that each method keeps.")
    ] = 0.25,
    json: Annotated[
        bool, typer.Option("--json", help="Print what is shown, and why what is not, as JSON.")
    ] = False,
) -> None:
    """Draw what every installed chunker, router and token stage keeps of the same images.

    Methods of installed plug-ins appear by themselves; what fails or chooses no tokens is named
    with its reason. Needs timm: `pip install "adaptok[hosts,see]"`.

    Example: `adaptok gallery --keep 0.3 --emoji parrot --emoji rainbow`
    """
    from adaptok.cli.galleries import GalleryOptions, make_gallery

    make_gallery(
        GalleryOptions(
            output=output,
            emoji=tuple(emoji or ()),
            images=tuple(image or ()),
            keep=keep,
            json=json,
        )
    )
