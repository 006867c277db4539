"""Draw what DC-DiT's chunker and the built-in routers keep of a photograph and a shipped emoji.

Usage: python scripts/draw_dc.py dc [--output docs/pictures/dc.png] [--name parrot]
       python scripts/draw_dc.py routers [--output docs/pictures/routers.png]

No trained model is needed: the host is the ViT of `adaptok gallery`, whose tokens are pixels. The
photograph is Matplotlib's sample image, Grace Hopper (US Navy, public domain).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from matplotlib import cbook
from PIL import Image

import adaptok
from adaptok.errors import AdaptokError, DataError
from adaptok.see import Panel, PanelRow, draw_panel_rows, save_figure
from adaptok.see.cells import paint_groups, shade_cells
from adaptok.see.pixel_host import BLOCKS, make_pixel_host, write_angles
from adaptok.train.emoji import decode_emoji, read_emoji_index

Pixels = npt.NDArray[np.uint8]

SIDE, PATCH = 224, 7
CELLS = SIDE // PATCH
PHOTOGRAPH = (0, 20, 512, 532)  # left, upper, right, lower: the square around the face
BUDGETS = (0.5, 0.25, 0.1)
SMALLEST = {"name": "norm", "smallest": True}
ROUTERS: dict[str, str | dict[str, object]] = {
    "predictability": "predictability",
    "covering": "covering",
    "cosine": "cosine",
    "entropy": "entropy",
    "norm": "norm",
    "norm, smallest": SMALLEST,
    "random": "random",
}
DARK, LIGHT = np.array([52.0, 60, 78]), np.array([232.0, 235, 241])  # what dropped cells fade to
SHARE = 0.25
TITLES = {
    "dc": f"dc, fresh: tokens of a grid of {CELLS} x {CELLS} cells",
    "routers": f"Routers without weights: the {SHARE:.0%} of the cells that each one keeps",
}
NOTES = {
    "dc": "Each token has the mean colour of the cells that it stands for; lines are the borders.",
    "routers": "Cells that have no token are faded. The host is a ViT whose tokens are pixels.",
}


def resize(picture: Pixels) -> Pixels:
    """Bring a picture to the size of the host."""
    image = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def load_photograph() -> Pixels:
    """Return the photograph that comes with Matplotlib."""
    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return resize(np.asarray(image.convert("RGB").crop(PHOTOGRAPH)))


def load_emoji(name: str) -> Pixels:
    """Return the shipped emoji of a name."""
    index = read_emoji_index()
    names = [entry.name for entry in index.entries]
    if name not in names:
        raise DataError(f"no shipped emoji is called {name!r}: names are in adaptok/zoo/emoji.json")
    return resize(decode_emoji(index)[names.index(name)])


def run(
    picture: Pixels, router: str | dict[str, object], keep: float
) -> tuple[npt.NDArray[np.int64], Pixels]:
    """Return the token of each cell, and the picture with faded dropped cells."""
    torch.manual_seed(0)
    host = adaptok.wrap(
        make_pixel_host(SIDE, PATCH),
        chunker="dc",
        router=router,
        span=(1, BLOCKS),  # in front of the first block all cells have the same length
        budget=keep,
        verify=False,
    )
    pixels = rearrange(torch.from_numpy(picture.copy()), "h w c -> 1 c h w")
    with torch.no_grad(), adaptok.trace(host) as seen:
        host(write_angles(pixels))
    step = seen.steps[0]
    token = step.provenance.token.view(CELLS, CELLS).numpy()
    kept = step.plans[0].keep_mask.view(CELLS, CELLS).numpy()
    return token, shade_cells(picture, kept, DARK if picture.mean() > 128 else LIGHT, 0.85)


def draw_budgets(name: str, picture: Pixels) -> list[PanelRow]:
    """Draw a picture, and what tokens stand for at each budget."""
    panels = [Panel(name, picture)]
    for keep in BUDGETS:
        token, _ = run(picture, "dc", keep)
        count = f"{len(np.unique(token))} tokens"
        panels.append(Panel(f"keep={keep:g}", paint_groups(picture, token), count, token))
    return [PanelRow(tuple(panels))]


def draw_routers(name: str, picture: Pixels) -> list[PanelRow]:
    """Draw a picture, and the cells that each router keeps, in two rows."""
    kept = [Panel(title, run(picture, router, SHARE)[1]) for title, router in ROUTERS.items()]
    return [PanelRow((Panel(name, picture), *kept[:3])), PanelRow(tuple(kept[3:]))]


def main() -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=tuple(TITLES))
    parser.add_argument("--output", type=Path, help="docs/pictures/SUBJECT.png unless given")
    parser.add_argument("--name", default="parrot", help="name of a shipped emoji")
    options = parser.parse_args()
    try:
        pictures = {options.name: load_emoji(options.name), "photograph": load_photograph()}
        draw = draw_budgets if options.subject == "dc" else draw_routers
        rows = [row for name, picture in pictures.items() for row in draw(name, picture)]
        figure = draw_panel_rows(
            rows, title=TITLES[options.subject], note=NOTES[options.subject], size=300
        )
        output = options.output or Path("docs/pictures") / f"{options.subject}.png"
        save_figure(figure, output)
    except AdaptokError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
