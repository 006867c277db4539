"""Chunkers, each broken in one way."""

from dataclasses import replace

import torch
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

from adaptok import Budget, Provenance
from adaptok.dc.host import HostChunker


class GoodChunker(HostChunker):
    """Chooses cells as DC-DiT does, and scales them by a weight."""

    router = None
    dechunker = None

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        return kept.with_x(kept.x * (1 + self.gain)), plan


class PlainChunker(HostChunker):
    """The same without weights."""

    router = None
    dechunker = None


def change_tokens(plan, change):
    """Let other tokens stand for the cells that are not kept."""
    counts = plan.computed[:, None]
    token = torch.where(plan.keep_mask, plan.provenance.token, change(plan, counts) % counts)
    return replace(plan, provenance=Provenance(token))


class TurnsGrid(PlainChunker):
    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        return kept, replace(plan, grid=plan.grid[::-1])


class NoPlan(PlainChunker):
    def forward(self, tokens, routing, budget):
        return super().forward(tokens, routing, budget)[0], None


class SwapsTokens(PlainChunker):
    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        token = plan.computed[:, None] - 1 - plan.provenance.token
        return kept, replace(plan, provenance=Provenance(token))


class PointsBehindTheEnd(PlainChunker):
    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        return kept, change_tokens(plan, lambda plan, counts: counts)


class OneTooMany(PlainChunker):
    def forward(self, tokens, routing, budget):
        n = tokens.x.shape[1]
        if budget.is_uniform and 1 < budget.count(n) < n:
            budget = Budget(tokens=budget.count(n) + 1)
        return super().forward(tokens, routing, budget)


class DropIgnored(PlainChunker):
    def forward(self, tokens, routing, budget):
        return super().forward(tokens, routing, budget if budget.drop is None else Budget())


class ChangesAll(PlainChunker):
    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        return (kept.with_x(kept.x + 1e-3) if bool(plan.keep_mask.all()) else kept), plan


class RaggedMixed(PlainChunker):
    uniform = False

    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        if budget.is_uniform != self.uniform:
            return kept, plan
        b = tokens.num_samples
        return kept, change_tokens(plan, lambda plan, _: plan.provenance.token + b)


class Mixed(RaggedMixed):
    uniform = True


class NoWayBack(PlainChunker):
    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        return (kept if budget.keep == 1.0 else kept.with_x(kept.x + 0.1)), plan


class NoGradient(PlainChunker):
    def forward(self, tokens, routing, budget):
        return super().forward(
            tokens, replace(routing, keep_prob=routing.keep_prob.detach()), budget
        )


class DetachedTokens(PlainChunker):
    def forward(self, tokens, routing, budget):
        return super().forward(tokens.with_x(tokens.x.detach()), routing, budget)


class TouchesPrefix(PlainChunker):
    def forward(self, tokens, routing, budget):
        answer = super().forward(tokens, routing, budget)
        whole = tokens.x._base
        if whole is not None and whole.ndim == 3 and whole.shape[1] > tokens.x.shape[1] + 1:
            whole[:, 0] += 1
        return answer


class NoLines(PlainChunker):
    def forward(self, tokens, routing, budget):
        break_on_a_line(tokens.grid)
        return super().forward(tokens, routing, budget)


class NoFlatImages(PlainChunker):
    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        return kept.with_x(kept.x + not_a_number_if_alike(tokens.x)), plan


class WorksInPlace(PlainChunker):
    def forward(self, tokens, routing, budget):
        if tokens.x.is_contiguous():
            tokens.x[..., 1].abs_()
        return super().forward(tokens, routing, budget)


class SeedsEverybody(PlainChunker):
    def forward(self, tokens, routing, budget):
        torch.manual_seed(0)
        return super().forward(tokens, routing, budget)


class Float32Only(PlainChunker):
    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        return kept.with_x(kept.x + 0.0 * (kept.x @ torch.ones(kept.width, 1))), plan


class NoAutocast(PlainChunker):
    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        x, rows = torch.zeros_like(kept.x), torch.arange(kept.x.shape[0])
        return kept.with_x(x.index_copy_(0, rows, kept.x @ torch.eye(kept.width).to(x))), plan


class SharedChunker(SharesWeights, GoodChunker):
    pass


class LambdaChunker(HoldsLambda, PlainChunker):
    pass


class HiddenOffset(PlainChunker):
    def __init__(self):
        super().__init__()
        self.offset = torch.randint(0, 10**9, (63,))

    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        offset = self.offset[: tokens.x.shape[1]]
        return kept, change_tokens(plan, lambda plan, _: plan.provenance.token + offset)


class RemembersPlan(PlainChunker):
    def forward(self, tokens, routing, budget):
        kept, plan = super().forward(tokens, routing, budget)
        self.last = [plan]
        return kept, plan


class AsksTheDevice(PlainChunker):
    def forward(self, tokens, routing, budget):
        if tokens.x.abs().max().item() > 1e9:
            budget = Budget(keep=1.0)
        return super().forward(tokens, routing, budget)


class ShyChunker(PlainChunker):
    def __init__(self, share: float = 0.5):
        super().__init__()
        self._share = share


class WantsMemoryInARow(PlainChunker):
    def forward(self, tokens, routing, budget):
        tokens.x.view(-1)
        return super().forward(tokens, routing, budget)


class BareGain(LosesPrefix, GoodChunker):
    pass


class PatchingChunker(PatchesTimm, GoodChunker):
    pass


NAMES = {"shy-chunker": ShyChunker}
VIEWS = frozenset({"prefix", "gradient", "unwrap"})

TWINS = {
    "answer": Twin(TurnsGrid),
    "provenance": Twin(SwapsTokens),
    "budgets": Twin(OneTooMany, frozenset({"uneven_batch"})),
    "extremes": Twin(ChangesAll, frozenset({"round_trip", "identity", "uneven_batch"})),
    "uneven_batch": Twin(RaggedMixed),
    "round_trip": Twin(NoWayBack, frozenset({"uneven_batch"})),
    "gradient": Twin(NoGradient),
    "prefix": Twin(TouchesPrefix),
    "odd_grids": Twin(NoLines, frozenset({"extremes"})),
    "constant": Twin(NoFlatImages),
    "inputs": Twin(WorksInPlace),
    "batch": Twin(Mixed, frozenset({"uneven_batch"})),
    "seed": Twin(SeedsEverybody),
    "half": Twin(Float32Only),
    "autocast": Twin(NoAutocast),
    "deepcopy": Twin(SharedChunker),
    "pickle": Twin(LambdaChunker),
    "state_dict": Twin(HiddenOffset),
    "stateless": Twin(RemembersPlan),
    "compile": Twin(AsksTheDevice),
    "options": Twin("shy-chunker"),
    "identity": Twin(WantsMemoryInARow, VIEWS),
    "keys": Twin(BareGain),
    "unwrap": Twin(PatchingChunker, frozenset({"identity"})),
}
MORE = {"answer": Twin(NoPlan), "budgets": Twin(DropIgnored)}
GOOD = (GoodChunker, PlainChunker)
