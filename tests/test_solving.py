"""The solver of stacks: order from effects, reasons for a refusal, the nearest stack that works."""

import pytest
from reducers import DropOdd, Leave, MergeEnd

import adaptok
from adaptok.errors import BudgetError, ConfigError, StackError
from adaptok.testing import make_vit


class Reuse(adaptok.Stage):
    effects = adaptok.Effects("time", keeps_state=True)

    def forward(self, inner, call):
        return inner(call)


class NeedsStep(Reuse):
    effects = adaptok.Effects("time", keeps_state=True, needs_step=True)


class Slice(adaptok.Stage):
    effects = adaptok.Effects("width")

    def forward(self, inner, call):
        return inner(call)


class ReadsAttention(DropOdd):
    effects = adaptok.Effects("tokens", changes_count=True, needs_attention=True)


def wrap(stack, chunker=None):
    return adaptok.wrap(make_vit(), chunker=chunker, stack=stack, budget=0.5, verify=False)


def test_order_is_time_depth_tokens_width_and_what_needs_the_grid_comes_first():
    model = wrap([Slice(), MergeEnd(), Leave(), Reuse()], {"name": "dc"})
    assert list(model.blocks.adaptok) == ["reuse", "leave", "dc", "mergeend", "slice"]


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ([Reuse(), Reuse()], r"'reuse' and 'reuse-2' both reuse earlier steps.*is \['reuse'\]"),
        ([Leave(), Leave()], r"both decide how many blocks run"),
        ([Slice(), Slice()], r"both slice the weights of the same blocks"),
        ([NeedsStep()], r"needs the diffusion step, and .* hands none over.*No part of it can run"),
        (
            [{"name": "dc", "layout": "packed"}, MergeEnd()],
            r"layout 'packed' runs its own form .*give it layout 'bucketed'",
        ),
        (
            [ReadsAttention(), Slice(), MergeEnd()],
            r"reads the attention inside the blocks, and 'slice' stands before them\. The nearest "
            r"stack that can is \['readsattention', 'mergeend'\], without 'slice'",
        ),
    ],
)
def test_refusals_name_the_reason_and_the_nearest_stack(stack, message):
    model = make_vit()
    before = model.state_dict().keys()
    with pytest.raises(StackError, match=message):
        adaptok.wrap(model, stack=stack, budget=0.5, verify=False)
    assert model.state_dict().keys() == before
    assert not adaptok.is_wrapped(model)


def test_a_budget_that_nobody_takes_is_refused():
    with pytest.raises(BudgetError, match="none of 'slice' does: leave it out"):
        wrap([Slice()])


def test_a_stage_can_be_given_as_the_chunker():
    class Named(MergeEnd):
        def __init__(self, r: int = 3):
            super().__init__("named-merge", r)

    adaptok.register_stage("named-merge")(Named)
    model = wrap([], "named-merge")
    assert list(model.blocks.adaptok) == ["named-merge"]
    again = wrap(["named-merge"])
    assert model.blocks.config.stack == again.blocks.config.stack
    with pytest.raises(ConfigError, match="router= and dechunker= change parts of a chunker"):
        adaptok.wrap(make_vit(), chunker="named-merge", router="dc")


def test_explain_says_order_and_sites():
    model = wrap([MergeEnd(), DropOdd(block=1), Leave()], {"name": "dc"})
    text = str(adaptok.explain(model))
    assert text.index("leave (depth)") < text.index("dc (tokens)") < text.index("mergeend (tokens)")
    assert "acts between attention and MLP of blocks 0 to 2" in text
    assert "shares one loop over the blocks with 'dropodd'" in text
    sliced = wrap([MergeEnd(), Slice()])
    notes = adaptok.explain(sliced).stages[0].notes
    assert "acts in front of blocks 0 to 2" in notes
    assert "not between attention and MLP: a stage of the class Slice stands before them" in notes
