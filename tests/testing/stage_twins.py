"""Stages, each broken in one way."""

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

from adaptok import Budget, Effects, ReduceStage, Reduction, Site, Stage
from adaptok.chunk_stage import ChunkStage
from adaptok.dc.host import HostChunker, HostDechunker, HostRouter


class GoodStage(ChunkStage):
    def __init__(self, width):
        super().__init__(HostRouter(width), HostChunker(), HostDechunker(width), "good")


class TextStage(GoodStage):
    """Changes the text stream, which the host of the checks does not have."""

    def change(self, text, call):
        return text

    def forward(self, inner, call):
        after = super().forward(inner, call)
        streams = {name: self.change(text, call) for name, text in after.streams.items()}
        return replace(after, streams=streams)


class HidesFewer(GoodStage):
    effects = Effects("tokens", needs_grid=True, compilable=True)


class NoEffects(GoodStage):
    effects = None


class TellsNobody(GoodStage):
    def forward(self, inner, call):
        return replace(
            super().forward(inner, replace(call, observers=())), observers=call.observers
        )


class Lowest(ReduceStage):
    """Drops tokens in front of the middle block, as in docs/write-a-plugin.md."""

    drops = True

    def __init__(self):
        super().__init__("lowest")

    def find_sites(self, inner):
        return [Site((inner.first + inner.last) // 2)]

    def reduce(self, moment):
        counts = moment.counts or (moment.x.shape[1],) * moment.x.shape[0]
        rank = moment.x.norm(dim=-1).argsort(dim=1, descending=True).argsort(dim=1)
        keep = rank < torch.tensor(counts)[:, None]
        owner = torch.where(keep, keep.cumsum(1) - 1, -1)
        places = (~keep).long().argsort(dim=1, stable=True)[:, : max(counts)]
        return Reduction(places, owner, lengths=counts)


class KeepsAllIfUneven(GoodStage):
    def choose_budget(self, call):
        budget = super().choose_budget(call)
        return budget if budget.is_uniform else Budget(keep=1.0)


class ByKeys(Lowest):
    """Ranks by keys, between attention and MLP, and lets the class token speak, too."""

    reads_keys = True
    reads_class_attention = True

    def find_sites(self, inner):
        if not inner.can_split:
            raise ZeroDivisionError
        return [Site(inner.first, "between")]

    def biases_keys(self, sites, block):
        return block > sites[0].block

    def bias_keys(self, moment):
        return moment.sizes.log()

    def reduce(self, moment):
        assert moment.keys.ndim == 4
        assert moment.class_attention.shape[-1] == moment.x.shape[1]
        return super().reduce(moment)


class WrongBias(ByKeys):
    def bias_keys(self, moment):
        return moment.sizes.log()[:, None, None]


class Plain(Stage):
    """Runs the blocks one after the other."""

    effects = Effects("depth", compilable=True)

    def go_on(self, after, call):
        """What the next block gets."""
        return after

    def forward(self, inner, call):
        after = call
        for block in range(inner.first, inner.last):
            after = self.go_on(inner.run(after, block, block + 1), call)
        return after


class NeverFewer(Plain):
    effects = Effects("tokens", changes_count=True)


class EndsFull(GoodStage):
    """Its last block gets all tokens again."""

    def forward(self, inner, call):
        after = super().forward(replace(inner, last=inner.last - 1), call)
        return inner.run(after, inner.last - 1, inner.last)


class ForgetsText(Plain):
    def go_on(self, after, call):
        return replace(after, streams=call.streams)


class FirstInputs(Plain):
    """Gives every sample the inputs of the first one."""

    names = ("sample_inputs",)

    def forward(self, inner, call):
        alike = {}
        if "sample_inputs" in self.names:
            alike["sample_inputs"] = {
                name: x[:1].expand_as(x) for name, x in call.sample_inputs.items()
            }
        if "condition" in self.names and call.condition is not None:
            alike["condition"] = call.condition[:1].expand_as(call.condition)
        after = super().forward(inner, replace(call, **alike))
        return replace(after, sample_inputs=call.sample_inputs, condition=call.condition)


class FirstCondition(FirstInputs):
    names = ("condition",)


class CutsText(TextStage):
    def change(self, text, call):
        return text[:, 1:]


class LosesArguments(GoodStage):
    def forward(self, inner, call):
        return replace(super().forward(inner, call), sample_inputs={})


class OneTooMany(GoodStage):
    def choose_budget(self, call):
        budget, n = super().choose_budget(call), call.num_cells
        if budget.is_uniform and 1 < budget.count(n) < n:
            return Budget(tokens=budget.count(n) + 1)
        return budget


class NeedsTwoTokens(GoodStage):
    def choose_budget(self, call):
        budget = super().choose_budget(call)
        if budget.count(call.num_cells) < 2:
            raise ZeroDivisionError
        return budget


class WorksInPlace(GoodStage):
    def forward(self, inner, call):
        for text in call.streams.values():
            text.clamp_(max=0.5)
        return super().forward(inner, call)


class NoGradient(GoodStage):
    def forward(self, inner, call):
        return super().forward(inner, call.with_x(call.x.detach()))


class NoCheckpoints(GoodStage):
    def forward(self, inner, call):
        return super().forward(inner, replace(call, checkpoint=False))


class TouchesOthers(GoodStage):
    def forward(self, inner, call):
        after = super().forward(inner, call)
        x, stop = after.x.clone(), after.start + after.num_cells
        x[:, stop:] += 1.0
        return after.with_x(x)


class NoLines(GoodStage):
    def forward(self, inner, call):
        break_on_a_line(call.grid)
        return super().forward(inner, call)


class NoFlatImages(TextStage):
    def change(self, text, call):
        return text + not_a_number_if_alike(call.cell_x)


class MixesSamples(TextStage):
    def change(self, text, call):
        return text + text.mean(0)


class SeedsEverybody(GoodStage):
    def forward(self, inner, call):
        torch.manual_seed(0)
        return super().forward(inner, call)


class Float32Only(TextStage):
    def change(self, text, call):
        return text + 0.0 * (text @ torch.ones(text.shape[-1], 1))


class NoAutocast(TextStage):
    def change(self, text, call):
        rows = torch.arange(text.shape[0])
        return torch.zeros_like(text).index_copy_(
            0, rows, text @ torch.eye(text.shape[-1]).to(text)
        )


class SharedStage(SharesWeights, GoodStage):
    pass


class LambdaStage(HoldsLambda, GoodStage):
    pass


class HiddenScale(TextStage):
    def __init__(self, width):
        super().__init__(width)
        self.scale = torch.rand(width)

    def change(self, text, call):
        return text * self.scale


class RemembersCall(GoodStage):
    def forward(self, inner, call):
        self.calls = {"last": call}
        return super().forward(inner, call)


class AsksTheDevice(TextStage):
    def change(self, text, call):
        return text if call.x.abs().max().item() < 1e9 else -text


class ShyStage(GoodStage):
    def __init__(self, width, share: float = 0.5):
        super().__init__(width)
        self._share = share


class ChangesAll(GoodStage):
    def forward(self, inner, call):
        after = super().forward(inner, call)
        n = call.num_cells
        full = self.budget_setting.is_uniform and self.budget_setting.count(n) == n
        return after.with_x(1.001 * after.x.abs()) if full else after


class BareStage(LosesPrefix, TextStage):
    def __init__(self, width):
        super().__init__(width)
        self.gain = torch.nn.Parameter(torch.zeros(1))

    def change(self, text, call):
        return text + self.gain


class MarksBlocks(GoodStage):
    def forward(self, inner, call):
        owner = getattr(inner.run, "__self__", None)
        if owner is not None:
            owner.blocks[0].was_here = True
        return super().forward(inner, call)


class PatchingStage(PatchesTimm, GoodStage):
    pass


NAMES = {"shy-stage": ShyStage}
TEXT = frozenset({"identity"})  # what happens to text, too, with every cell kept

TWINS = {
    "effects": Twin(HidesFewer),
    "count": Twin(CutsText, TEXT),
    "call": Twin(LosesArguments),
    "budgets": Twin(OneTooMany),
    "extremes": Twin(NeedsTwoTokens, frozenset({"count", "budgets", "odd_grids"})),
    "inputs": Twin(WorksInPlace, TEXT),
    "gradient": Twin(NoGradient),
    "checkpointing": Twin(NoCheckpoints),
    "prefix": Twin(TouchesOthers, TEXT),
    "odd_grids": Twin(NoLines, frozenset({"extremes"})),
    "constant": Twin(NoFlatImages),
    "batch": Twin(MixesSamples, TEXT),
    "seed": Twin(SeedsEverybody),
    "half": Twin(Float32Only),
    "autocast": Twin(NoAutocast),
    "deepcopy": Twin(SharedStage),
    "pickle": Twin(LambdaStage),
    "state_dict": Twin(HiddenScale, TEXT),
    "stateless": Twin(RemembersCall),
    "compile": Twin(AsksTheDevice),
    "options": Twin("shy-stage"),
    "identity": Twin(ChangesAll),
    "keys": Twin(BareStage, frozenset({"gradient"})),
    "unwrap": Twin(MarksBlocks),
}
MORE = {
    "effects": Twin(TellsNobody),
    "budgets": Twin(KeepsAllIfUneven),
    "identity": Twin(ForgetsText),
    "batch": Twin(FirstInputs),
    "unwrap": Twin(PatchingStage),
}
GOOD = (GoodStage, TextStage, Lowest, ByKeys)
