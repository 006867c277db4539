"""Routers, each broken in one way."""

from types import SimpleNamespace

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

from adaptok import Router, Routing


class GoodRouter(Router):
    def __init__(self, width):
        super().__init__()
        self.score = nn.Linear(width, 1)

    def centre(self, x):
        return x - x.mean(1, keepdim=True)

    def judge(self, x):
        return self.score(self.centre(x)).squeeze(-1)

    def forward(self, tokens, context):
        return Routing(self.judge(tokens.x).sigmoid())


class NoRouting(GoodRouter):
    def forward(self, tokens, context):
        return SimpleNamespace(keep_prob=super().forward(tokens, context).keep_prob)


class OverOne(GoodRouter):
    """Leaves [0, 1] with the steps that pipelines give."""

    def forward(self, tokens, context):
        prob = super().forward(tokens, context).keep_prob
        if context.timestep is not None:
            prob = prob * context.timestep[:, None]
        return Routing(prob)


class ScalesSteps(GoodRouter):
    """Takes the largest step of the batch for a sample's own."""

    def forward(self, tokens, context):
        score = self.judge(tokens.x)
        if context.timestep is not None:
            score = score + context.timestep[:, None] / context.timestep.max()
        return Routing(score.sigmoid())


class NoSteps(GoodRouter):
    def forward(self, tokens, context):
        if context.timestep is not None:
            raise ZeroDivisionError
        return super().forward(tokens, context)


class ReadsFirstCondition(GoodRouter):
    def forward(self, tokens, context):
        score = self.judge(tokens.x)
        if context.condition is not None:
            score = score + context.condition[0].mean()
        return Routing(score.sigmoid())


class ManyCells(GoodRouter):
    """Has one number for each cell of the grids that it was tried on."""

    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("weight", torch.linspace(0.5, 1.0, 24))

    def judge(self, x):
        return super().judge(x) * self.weight[: x.shape[1]]


class AllAlike(GoodRouter):
    def judge(self, x):
        return super().judge(x.cumsum(1)).mean(1, keepdim=True).expand(-1, x.shape[1])


class StartsFull(GoodRouter):
    starts_full = True


class NoGradient(GoodRouter):
    def forward(self, tokens, context):
        return Routing(super().forward(tokens, context).keep_prob.detach())


class NoLines(GoodRouter):
    def forward(self, tokens, context):
        break_on_a_line(tokens.grid)
        return super().forward(tokens, context)


class NoFlatImages(GoodRouter):
    def judge(self, x):
        return super().judge(x) + not_a_number_if_alike(x)


class WorksInPlace(GoodRouter):
    def judge(self, x):
        return super().judge(x.contiguous().clamp_(-1, 1))


class WorksOnViews(GoodRouter):
    def judge(self, x):
        return super().judge(x.clamp_(-1, 1))


class MixesSamples(GoodRouter):
    def centre(self, x):
        return x - x.mean((0, 1))


class SeedsEverybody(GoodRouter):
    def judge(self, x):
        torch.manual_seed(0)
        return super().judge(x)


class Float32Only(GoodRouter):
    def judge(self, x):
        return super().judge(x) + 0.0 * (x @ torch.ones(x.shape[-1], 1)).squeeze(-1)


class NoAutocast(GoodRouter):
    def judge(self, x):
        prob, cells = torch.zeros_like(x[..., 0]), torch.arange(x.shape[1])
        return prob.index_copy_(1, cells, super().judge(x))


class SharedRouter(SharesWeights, GoodRouter):
    pass


class LambdaRouter(HoldsLambda, GoodRouter):
    pass


class HiddenDirection(GoodRouter):
    def __init__(self, width):
        super().__init__(width)
        self.direction = torch.randn(width)

    def judge(self, x):
        return super().judge(x) + (self.centre(x) * self.direction).mean(-1)


class RemembersAnswer(GoodRouter):
    def forward(self, tokens, context):
        routing = super().forward(tokens, context)
        self.last = {"answers": [routing.keep_prob.detach()]}
        return routing


class AsksTheDevice(GoodRouter):
    def judge(self, x):
        score = super().judge(x)
        return score if score.abs().max().item() < 1e9 else -score


class ShyRouter(GoodRouter):
    def __init__(self, width, scale: float = 1.0):
        super().__init__(width)
        self._scale = scale


class ForgetfulRouter(GoodRouter):
    def __init__(self, width, scale: float = 1.0):
        super().__init__(width)
        self.scale = 1.0


class BareKeys(LosesPrefix, GoodRouter):
    pass


class BareWeight(BareKeys):
    def __init__(self, width):
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(1))

    def judge(self, x):
        return super().judge(x) + self.bias


class PatchingRouter(PatchesTimm, GoodRouter):
    pass


NAMES = {"shy-router": ShyRouter, "forgetful-router": ForgetfulRouter}
IN_HOST = frozenset({"identity", "unwrap"})

TWINS = {
    "shape": Twin(NoRouting, IN_HOST),
    "range": Twin(AllAlike),
    "context": Twin(OverOne),
    "starts_full": Twin(StartsFull),
    "gradient": Twin(NoGradient),
    "odd_grids": Twin(NoLines),
    "constant": Twin(NoFlatImages),
    "inputs": Twin(WorksInPlace),
    "batch": Twin(MixesSamples, frozenset({"context"})),
    "seed": Twin(SeedsEverybody),
    "half": Twin(Float32Only),
    "autocast": Twin(NoAutocast),
    "deepcopy": Twin(SharedRouter),
    "pickle": Twin(LambdaRouter),
    "state_dict": Twin(HiddenDirection),
    "stateless": Twin(RemembersAnswer),
    "compile": Twin(AsksTheDevice),
    "options": Twin("shy-router"),
    "identity": Twin(WorksOnViews, frozenset({"inputs"})),
    "keys": Twin(BareWeight),
    "unwrap": Twin(PatchingRouter, frozenset({"identity"})),
}
GOOD = (GoodRouter,)
MORE = {
    "options": Twin({"name": "forgetful-router", "scale": 2.0}),
    "odd_grids": Twin(ManyCells),
    "context": Twin(ScalesSteps),
}
