import copy
import warnings

import pytest
import torch

import adaptok
from adaptok.errors import FullBudgetWarning
from adaptok.losses import ratio_loss
from adaptok.testing import make_vit

IMAGE = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(6))


def make_wrapped(**options):
    return adaptok.wrap(make_vit(), **({"chunker": "dc", "budget": 0.25} | options))


def test_a_trace_has_one_step_per_call_with_all_that_was_decided():
    vit = make_wrapped()
    with adaptok.trace(vit) as trace, torch.no_grad():
        vit(IMAGE)
        vit(IMAGE[:, :, :16])
    vit(IMAGE)
    first, second = trace.steps
    assert first.grid == (4, 6)
    assert second.grid == (2, 6)
    assert first.stages == ("dc",)
    assert first.kept.tolist() == [6, 6]
    assert second.kept_share == pytest.approx(0.25)
    assert first.routings[0].keep_mask.sum(1).tolist() == [6, 6]
    assert torch.equal(first.provenance.token, first.plans[0].provenance.token)
    assert first.flops > second.flops > 0
    assert first.ms > 0


def test_flops_of_a_trace_follow_the_kept_tokens():
    vit = make_wrapped()
    with adaptok.trace(vit) as trace, torch.no_grad():
        vit(IMAGE)
        with adaptok.budget(vit, keep=1.0):
            vit(IMAGE)
    assert trace.steps[0].flops < 0.5 * trace.steps[1].flops


def test_nothing_is_left_on_the_model_and_a_failed_call_closes_the_trace():
    vit = make_wrapped()
    before = {k: v for k, v in vars(vit.blocks).items() if k != "_modules"}
    with pytest.raises(RuntimeError), adaptok.trace(vit) as trace:
        vit(torch.randn(2, 5, 32, 48))
    assert trace.steps == []
    with adaptok.trace(vit), adaptok.collect_losses(vit):
        vit(IMAGE)
    assert {k: v for k, v in vars(vit.blocks).items() if k != "_modules"} == before
    copy.deepcopy(vit)
    assert torch.nn.Module not in map(type, vit.blocks.observers)


def test_losses_are_summed_over_calls_and_train_the_router():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FullBudgetWarning)
        vit = make_wrapped(budget=None).train()
    with adaptok.collect_losses(vit) as losses, adaptok.trace(vit) as trace:
        vit(IMAGE)
        vit(IMAGE)
    wanted = sum(ratio_loss(step.routings[0], 2.0) for step in trace.steps)
    torch.testing.assert_close(losses["ratio"], wanted)
    losses["ratio"].backward()
    assert vit.blocks.adaptok["dc"].router.logit.bias.grad.abs().item() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_does_not_add_losses_twice(reentrant):
    vit = make_wrapped().train()
    image = IMAGE.clone().requires_grad_(True)
    with adaptok.collect_losses(vit) as losses:
        out = torch.utils.checkpoint.checkpoint(vit, image, use_reentrant=reentrant)
        once = losses["ratio"].item()
        out.sum().backward()
    assert losses["ratio"].item() == once


def test_no_loss_for_a_router_that_only_ranks():
    vit = make_wrapped(router="norm")
    with adaptok.collect_losses(vit) as losses:
        vit(IMAGE)
    assert losses == {}


def test_request_reaches_the_router_and_ends():
    seen = []

    class Asking(adaptok.Router):
        def forward(self, tokens, context):
            seen.append((context.request, context.branch))
            return adaptok.Routing(tokens.x.norm(dim=-1).sigmoid())

    vit = make_wrapped(router=Asking())
    seen.clear()
    with adaptok.request(vit, "a", branch="cond"):
        vit(IMAGE)
    with adaptok.request(vit, "b"):
        vit(IMAGE)
    vit(IMAGE)
    assert seen == [("a", "cond"), ("b", None), (None, None)]


def test_traces_are_printed_without_their_tensors():
    vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
    with adaptok.trace(vit) as seen:
        vit(torch.randn(2, 3, 32, 48))
        vit(torch.randn(1, 3, 32, 48))
    assert repr(seen.steps[0]).startswith("TraceStep(grid=(4, 6), stages=('dc',), kept=[12, 12]")
    assert str(seen).splitlines()[0] == "Trace of 2 steps"
    assert len(str(seen)) < 400
