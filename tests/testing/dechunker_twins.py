"""Dechunkers, each broken in one way."""

from types import SimpleNamespace

import torch
from einops import rearrange
from testing.twins import (
    HoldsLambda,
    LosesPrefix,
    PatchesTimm,
    SharesWeights,
    Twin,
    break_on_a_line,
    not_a_number_if_alike,
)
from torch import nn

from adaptok import Dechunker


class GoodDechunker(Dechunker):
    """Kept cells take their token, times a weight; dropped ones keep what they have."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))

    def change(self, update, chunks, plan, before):
        """Change what is added to each kept cell, `(rows d)`."""
        return update

    def rest(self, x, chunks, plan, before):
        """Change the answer, `(b n d)`."""
        return x

    def forward(self, chunks, plan, before):
        h = chunks.x if chunks.is_packed else rearrange(chunks.x, "b m d -> (b m) d")
        flat = rearrange(before.x, "b n d -> (b n) d")
        update = self.change(h - flat[plan.rows], chunks, plan, before)
        x = torch.zeros_like(flat).index_put((plan.rows,), update.to(flat.dtype))
        x = (before.x.flatten(0, 1) + x * (1 + self.gain).to(flat.dtype)).view_as(before.x)
        x = torch.where(self.exact(plan)[..., None], put(before.x, h, plan), x)
        return before.with_x(self.rest(x, chunks, plan, before))

    def exact(self, plan):
        """Where all cells are kept and no weight says otherwise, what came is given back."""
        return plan.keep_mask.all(1, keepdim=True) & (self.gain == 0).all()


def put(x, h, plan):
    flat = rearrange(x, "b n d -> (b n) d")
    return flat.index_copy(0, plan.rows, h.to(flat.dtype)).view_as(x)


class NoTokens(GoodDechunker):
    def forward(self, chunks, plan, before):
        return SimpleNamespace(x=super().forward(chunks, plan, before).x)


class PackedOtherwise(GoodDechunker):
    def change(self, update, chunks, plan, before):
        return 1.1 * update if chunks.is_packed else update


class ZerosElsewhere(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        return torch.where(plan.keep_mask[..., None], x, 0.0)


class OtherCells(GoodDechunker):
    def change(self, update, chunks, plan, before):
        if chunks.is_packed:
            return update
        return rearrange(update, "(b m) d -> b m d", b=before.num_samples).roll(1, 1).flatten(0, 1)


class NeedsTwoTokens(GoodDechunker):
    def change(self, update, chunks, plan, before):
        if int(plan.computed.min()) < 2:
            raise ZeroDivisionError
        return update


class FollowsPlan(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        h = chunks.x if chunks.is_packed else rearrange(chunks.x, "b m d -> (b m) d")
        update = h - rearrange(before.x, "b n d -> (b n) d")[plan.rows]
        spread = update.index_select(0, plan.sources).view_as(x)
        return torch.where(plan.keep_mask[..., None], x, x + 0.5 * spread)


class FollowsBackwards(GoodDechunker):
    """Reads the row -1 where a cell has no token: the last one of the batch."""

    def rest(self, x, chunks, plan, before):
        h = chunks.x if chunks.is_packed else rearrange(chunks.x, "b m d -> (b m) d")
        update = h - rearrange(before.x, "b n d -> (b n) d")[plan.rows]
        spread = update[plan.sources].view_as(x)
        return torch.where(plan.keep_mask[..., None], x, x + 0.5 * spread)


class NoGradient(GoodDechunker):
    def forward(self, chunks, plan, before):
        return super().forward(chunks.with_x(chunks.x.detach()), plan, before)


class TouchesPrefix(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        whole = before.x._base
        if whole is not None and whole.ndim == 3 and whole.shape[1] > before.x.shape[1] + 1:
            whole[:, 0] += 1
        return x


class NoLines(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        break_on_a_line(plan.grid)
        return x


class NoFlatImages(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        return x + not_a_number_if_alike(before.x)


class WorksInPlace(GoodDechunker):
    def forward(self, chunks, plan, before):
        x = before.x
        if x.is_contiguous():
            x[..., 1] = torch.where(plan.keep_mask, x[..., 1], x[..., 1].abs())
        return super().forward(chunks, plan, before)


class MixesSamples(GoodDechunker):
    def change(self, update, chunks, plan, before):
        return update + 0.1 * update.mean(0)


class SeedsEverybody(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        torch.manual_seed(0)
        return x


class Float32Only(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        return x + 0.0 * (x @ torch.ones(x.shape[-1], 1))


class NoAutocast(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        rows = torch.arange(x.shape[0])
        return torch.zeros_like(x).index_copy_(0, rows, x @ torch.eye(x.shape[-1]).to(x))


class SharedDechunker(SharesWeights, GoodDechunker):
    pass


class LambdaDechunker(HoldsLambda, GoodDechunker):
    pass


class HiddenScale(GoodDechunker):
    def __init__(self, width):
        super().__init__(width)
        self.scale = torch.rand(width)

    def change(self, update, chunks, plan, before):
        return update * (1 + self.scale)


class RemembersCells(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        self.last = x.detach()
        return x


class AsksTheDevice(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        return -x if x.abs().max().item() > 1e9 else x


class ShyDechunker(GoodDechunker):
    def __init__(self, width, share: float = 0.5):
        super().__init__(width)
        self._share = share


class WantsMemoryInARow(GoodDechunker):
    def rest(self, x, chunks, plan, before):
        before.x.view(-1)
        return x


class BareGain(LosesPrefix, GoodDechunker):
    pass


class PatchingDechunker(PatchesTimm, GoodDechunker):
    pass


NAMES = {"shy-dechunker": ShyDechunker}
ONE_TOKEN = frozenset({"answer", "round_trip", "kept", "odd_grids"})

TWINS = {
    "answer": Twin(NoTokens),
    "packed": Twin(PackedOtherwise),
    "round_trip": Twin(ZerosElsewhere),
    "kept": Twin(OtherCells, frozenset({"packed"})),
    "extremes": Twin(NeedsTwoTokens, ONE_TOKEN),
    "pruned": Twin(FollowsPlan),
    "gradient": Twin(NoGradient),
    "prefix": Twin(TouchesPrefix),
    "odd_grids": Twin(NoLines, frozenset({"extremes"})),
    "constant": Twin(NoFlatImages),
    "inputs": Twin(WorksInPlace),
    "batch": Twin(MixesSamples),
    "seed": Twin(SeedsEverybody),
    "half": Twin(Float32Only),
    "autocast": Twin(NoAutocast),
    "deepcopy": Twin(SharedDechunker),
    "pickle": Twin(LambdaDechunker),
    "state_dict": Twin(HiddenScale),
    "stateless": Twin(RemembersCells),
    "compile": Twin(AsksTheDevice),
    "options": Twin("shy-dechunker"),
    "identity": Twin(WantsMemoryInARow, frozenset({"prefix", "unwrap"})),
    "keys": Twin(BareGain),
    "unwrap": Twin(PatchingDechunker),
}
MORE = {"pruned": Twin(FollowsBackwards)}
GOOD = (GoodDechunker,)
