"""A small host with all that a backbone has to sort: positions, a condition, text."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from adaptok import Backbone, BlockCall, HostInputs, HostNumbers, TokenInput
from adaptok.hosts import bind_arguments, refuse_option, require

WIDTH, PATCH = 16, 4


class JointBlock(nn.Module):
    """Image tokens with positions attend to themselves and to text, and the other way round."""

    strength = 1.0

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.image, self.text = (
            nn.Linear(WIDTH, WIDTH) for _ in range(5)
        )

    def forward(self, x, positions, condition, text):
        z = torch.cat([self.norm(x) * (1 + condition[:, None]), self.norm(text)], dim=1)
        places = nn.functional.pad(positions, (0, 0, 0, text.shape[1]))
        query, key = self.query(z) + places, self.key(z) + places
        mixed = scaled_dot_product_attention(query, key, self.value(z))
        image, words = mixed[:, : x.shape[1]], mixed[:, x.shape[1] :]
        return x + self.strength * self.image(image), text + self.strength * self.text(words)


class JointHost(nn.Module):
    """A class token, patches with positions, text beside them."""

    block = JointBlock

    def __init__(self, depth=3):
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.start = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList([self.block() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 5)
        self.checkpointing = False

    def set_grad_checkpointing(self, enable=True):
        self.checkpointing = enable

    def positions(self, h, w):
        angles = torch.arange(h)[:, None, None] * 0.9 + torch.arange(w)[:, None] * 0.37
        table = torch.sin(angles * torch.arange(1, WIDTH + 1) * 0.4).flatten(0, 1)
        return nn.functional.pad(table, (0, 0, 1, 0))[None].to(self.start.dtype)

    def forward(self, image, text, layers=None):
        cells = self.embed(image)
        positions = self.positions(*cells.shape[-2:])
        cells = cells.flatten(2).mT
        x = torch.cat([self.start.expand(cells.shape[0], -1, -1), cells], dim=1)
        condition = text.mean(1)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x, text = checkpoint(block, x, positions, condition, text, use_reentrant=False)
            else:
                x, text = block(x, positions=positions, condition=condition, text=text)
        return self.head(torch.cat([x, text], dim=1).cumsum(1)[:, -1] + x[:, 0])


def make_inputs(model=None, b=3):
    """Samples that differ, an image that is not square."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 3, 4 * PATCH, 6 * PATCH, generator=generator)
    text = torch.randn(3, 4, WIDTH, generator=generator)
    scale = torch.tensor([1.0, 0.3, 2.0])
    return HostInputs((image[:b] * scale[:b, None, None, None], text[:b] * scale[:b, None, None]))


class JointBackbone(Backbone):
    name = "joint"
    family = "the small host of these tests"
    versions = "any"

    @classmethod
    def match(cls, model):
        require(isinstance(model, JointHost), "no JointHost")
        return cls(containers=("blocks",), width=WIDTH, depth=len(model.blocks))

    def hand_over(self, entrance, module, args, kwargs):
        given = bind_arguments(("image", "text", "layers"), args, kwargs)
        if given.get("layers") is not None:
            refuse_option("layers=", "unwrap the model")
        return HostNumbers(self.grid(given["image"]), start=1)

    def grid(self, image):
        return (image.shape[-2] // PATCH, image.shape[-1] // PATCH)

    def read(self, numbers, args, kwargs):
        given = bind_arguments(("x", "positions", "condition", "text"), args, kwargs)
        return BlockCall(
            given["x"],
            numbers.grid,
            numbers.start,
            streams={"text": given["text"]},
            token_inputs={"positions": TokenInput(given["positions"], (1,), start=1)},
            sample_inputs={"condition": given["condition"]},
        )

    def run(self, block, index, call):
        x, text = block(
            call.x,
            positions=call.token_inputs["positions"].value,
            condition=call.sample_inputs["condition"],
            text=call.streams["text"],
        )
        return replace(call, x=x, streams={"text": text})

    def write(self, call):
        return call.x, call.streams["text"]

    def example(self, model):
        inputs = make_inputs(b=2)
        dtype = model.start.dtype
        return HostInputs(tuple(x.to(dtype) for x in inputs.args))
