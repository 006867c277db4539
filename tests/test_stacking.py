import copy

import pytest
import torch
from torch import nn
from wrapped_vit import (
    IMAGE,
    UnevenRouter,
    make_wrapped,
)

import adaptok
from adaptok.errors import (
    StackError,
)
from adaptok.testing import make_vit


class Recording(adaptok.Stage):
    effects = adaptok.Effects("depth")

    def __init__(self, log=None):
        super().__init__()
        self.log = log

    def forward(self, inner, call):
        if self.log is not None:
            self.log.append((inner.first, inner.last, call.x.shape[1]))
        return inner.run(inner.run(call, inner.first, inner.first + 1), inner.first + 1, inner.last)


def test_stages_stack_from_time_to_width_and_may_run_some_of_the_blocks():
    log = []
    vit = make_vit()
    expected = adaptok.wrap(vit, chunker="dc", budget=0.5)(IMAGE)
    adaptok.unwrap(vit)
    adaptok.wrap(vit, chunker=vit_chunker(), stack=[Recording(log)], router="dc", budget=0.5)
    log.clear()
    seen = vit(IMAGE)
    # depth is outside tokens: it sees the whole sequence, and calls the chunker twice
    assert log == [(0, 3, 25)]
    assert list(vit.blocks.adaptok) == ["recording", "dc"]
    assert seen.shape == expected.shape


def vit_chunker():
    return {"name": "dc"}


def test_a_chunker_in_the_stack_is_the_same_as_chunker():
    a, b = make_wrapped(), make_wrapped(chunker=None, stack=["dc"])
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(IMAGE), b(IMAGE))


def test_two_chunkers_in_a_row_are_refused_with_the_reason():
    vit = make_vit()
    with pytest.raises(
        StackError, match=r"'dc-2' both need every grid cell.*nearest .* is \['dc'\]"
    ):
        adaptok.wrap(vit, chunker="dc", stack=["dc"], budget=0.5)
    assert not adaptok.is_wrapped(vit)


def test_two_models_do_not_share_a_budget():
    a, b = make_wrapped(), make_wrapped()
    adaptok.set_budget(a, keep=0.25)
    with adaptok.trace(b) as trace:
        b(IMAGE)
    assert trace.steps[0].kept.tolist() == [12, 12, 12]


def test_uncond_drop_needs_branches():
    vit = make_wrapped(router={"name": "dc", "prior": "norm"})
    with (
        adaptok.budget(vit, drop=0.0, uncond_drop=0.5),
        pytest.raises(ValueError, match="which of the 3 samples are unconditional"),
    ):
        vit(IMAGE)
    with (
        adaptok.budget(vit, drop=0.0, uncond_drop=0.5),
        adaptok.request(vit, "one", branch="uncond"),
        adaptok.trace(vit) as trace,
    ):
        vit(IMAGE)
    assert trace.steps[0].plans[0].requested.tolist() == [12, 12, 12]
    with (
        adaptok.budget(vit, uncond_drop=0.5),
        adaptok.request(vit, "one", branch="cond"),
        adaptok.trace(vit) as trace,
    ):
        vit(IMAGE)
    assert trace.steps[0].kept.tolist() == [24, 24, 24]
    with pytest.raises(ValueError, match="uncond_drop goes with drop="):
        adaptok.set_budget(vit, keep=0.5, uncond_drop=0.9)


@pytest.mark.parametrize("budget", [{"keep": [0.2, 0.5, 0.9]}, {"drop": 0.3}, {"keep": 1.0}, {}])
def test_the_packed_layout_computes_the_same_with_exact_counts(budget):
    exact = {"name": "dc", "buckets": 24}  # as many buckets as cells: nothing is rounded
    a = make_wrapped(chunker=exact, router=UnevenRouter(), budget=budget, span=(1, 3))
    b = make_wrapped(
        chunker={"name": "dc", "layout": "packed"},
        router=UnevenRouter(),
        budget=budget,
        span=(1, 3),
    )
    sizes = []
    b.blocks.blocks[1].mlp.register_forward_pre_hook(lambda _, args: sizes.append(args[0].ndim))
    with adaptok.trace(a) as first, adaptok.trace(b) as second:
        torch.testing.assert_close(b(IMAGE), a(IMAGE), atol=1e-5, rtol=1e-5)
    assert torch.equal(first.steps[0].kept, second.steps[0].kept)
    assert second.steps[0].plans[0].layout == "packed"
    assert set(sizes) == {2}  # packed tokens (t d) went through the blocks
    other = copy.deepcopy(b)
    other.blocks.blocks[1].mlp.fc1.weight.data.zero_()
    assert not torch.allclose(other(IMAGE), b(IMAGE))


def test_the_packed_layout_is_refused_where_blocks_have_no_packed_form():
    vit = make_vit()
    vit.blocks[2].attn = nn.Identity()
    with pytest.raises(StackError, match="packed"):
        adaptok.wrap(vit, chunker={"name": "dc", "layout": "packed"}, budget=0.5)
    assert not adaptok.is_wrapped(vit)
