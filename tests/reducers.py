"""Small stages that reduce tokens, for tests of the loop: their decisions are easy to follow."""

import torch

from adaptok import Effects, ReduceStage, Reduction, Site, Stage


class MergeEnd(ReduceStage):
    """Merges the last tokens of the sequence into the last one that stays, `r` at each block."""

    reads_keys = True

    def __init__(self, name="merge-end", r=3, bias=True, **options):
        super().__init__(name, **options)
        self.r = r
        self.bias = bias

    def find_sites(self, inner):
        where = "between" if inner.can_split else "before"
        return [Site(block, where) for block in range(inner.first, inner.last)]

    def count_naturally(self, n, steps):
        for _ in range(steps):
            n = max(1, n - min(self.r, n // 2))
        return n

    def biases_keys(self, sites, block):
        return self.bias

    def bias_keys(self, moment):
        return moment.sizes.log() if moment.x.shape[1] < moment.owner.shape[1] else None

    def reduce(self, moment):
        b, m = moment.sizes.shape
        counts = moment.counts or (max(1, m - min(self.r, m // 2)),) * b
        longest = max(counts)
        places = torch.arange(m).expand(b, -1)[:, :longest]
        owner = torch.stack([torch.arange(m).clamp(max=count - 1) for count in counts])
        weights = moment.sizes.to(moment.x.dtype)[..., None]
        index = owner[..., None].expand_as(moment.x)
        zeros = moment.x.new_zeros(b, longest, moment.x.shape[2])
        total = zeros[..., :1].scatter_add(1, owner[..., None], weights)
        x = zeros.scatter_add(1, index, moment.x * weights) / total.clamp(min=1)
        return Reduction(places, owner, x, None if len(set(counts)) == 1 else tuple(counts))


class DropOdd(ReduceStage):
    """Drops every second token at one block; where the budget says so, the last ones."""

    drops = True

    def __init__(self, name="drop-odd", block=None, **options):
        super().__init__(name, **options)
        self.block = block

    def find_sites(self, inner):
        block = inner.first if self.block is None else self.block
        return [Site(block)] if inner.first <= block < inner.last else []

    def count_naturally(self, n, steps):
        return (n + 1) // 2

    def reduce(self, moment):
        b, m = moment.sizes.shape
        if moment.counts is None:
            places = torch.arange(0, m, 2).expand(b, -1)
            kept = torch.arange(m) % 2 == 0
            return Reduction(places, torch.where(kept, torch.arange(m) // 2, -1).expand(b, -1))
        counts = torch.tensor(moment.counts)[:, None]
        order = torch.arange(m)
        places = order.expand(b, -1)[:, : max(moment.counts)]
        return Reduction(places, torch.where(order < counts, order, -1), lengths=moment.counts)


class Leave(Stage):
    """A depth stage: even samples run all blocks, odd ones only the first half."""

    effects = Effects("depth")
    name = "leave"

    def forward(self, inner, call):
        middle = (inner.first + inner.last) // 2
        call = inner.run(call, inner.first, middle)
        even = torch.arange(0, call.x.shape[0], 2)
        after = inner.run(call.select(even), middle, inner.last)
        return call.with_x(call.x.index_copy(0, even, after.x))
