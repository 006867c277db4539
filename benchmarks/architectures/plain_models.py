"""A user's own models: nothing but a list of blocks."""

import torch
from torch import Tensor, nn

from .case import HostCase, HostInputs, build_quietly, make_images

CELLS = (5, 7)
WIDTH = 96


class Unit(nn.Module):
    """Attention and MLP of `torch.nn`, norms in front."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_a = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_b = nn.LayerNorm(width)
        self.think = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (b n d)."""
        normed = self.norm_a(tokens)
        tokens = tokens + self.mix(normed, normed, normed, need_weights=False)[0]
        out: Tensor = tokens + self.think(self.norm_b(tokens))
        return out


class OwnViT(nn.Module):
    """Two learned tokens in front, blocks deep inside under an unusual name."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.front_tokens = nn.Parameter(torch.zeros(1, 2, WIDTH))
        self.place_table = nn.Parameter(torch.zeros(1, CELLS[0] * CELLS[1], WIDTH))
        self.trunk = nn.ModuleDict({"units": nn.ModuleList(Unit(WIDTH, 2) for _ in range(4))})
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (b 10)."""
        cells = self.patches(image).flatten(2).transpose(1, 2) + self.place_table
        tokens = torch.cat([self.front_tokens.expand(len(image), -1, -1), cells], dim=1)
        for unit in self.trunk["units"].children():
            tokens = unit(tokens)
        logits: Tensor = self.head(tokens[:, :2].mean(1) + tokens[:, 2:].mean(1))
        return logits


class OwnSequence(nn.Module):
    """Blocks of `torch.nn` in a Sequential that is called as a whole; no prefix, image out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.place_table = nn.Parameter(torch.zeros(1, CELLS[0] * CELLS[1], WIDTH))
        self.stack = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(4)
            )
        )
        self.paint = nn.Linear(WIDTH, 3)

    def forward(self, image: Tensor) -> Tensor:
        """Return colours of the cells (b n 3)."""
        cells = self.patches(image).flatten(2).transpose(1, 2) + self.place_table
        colours: Tensor = self.paint(self.stack(cells))
        return colours


def describe(name: str, make: type[nn.Module], container: str, prefix: int, notes: str) -> HostCase:
    """Return the case of a user's model."""
    return HostCase(
        name=f"plain/{name}",
        family="plain",
        build=build_quietly(make),
        inputs=lambda model: HostInputs((make_images(CELLS, patch=8),)),
        cells=CELLS,
        output=lambda out: out,
        containers=(container,),
        prefix=prefix,
        notes=notes,
    )


PLAIN_CASES = (
    describe("own_vit", OwnViT, "trunk.units", 2, "a nested ModuleList, two prefix tokens"),
    describe("own_sequence", OwnSequence, "stack", 0, "a Sequential of torch's own layers"),
)
