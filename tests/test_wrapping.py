import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from wrapped_vit import (
    IMAGE,
    UnevenRouter,
    make_wrapped,
    state_of,
)

import adaptok
from adaptok.dc.host import HostChunker, HostDechunker, HostRouter
from adaptok.errors import (
    FullBudgetWarning,
    HandOverError,
    HostOptionError,
)
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights


def test_a_wrap_keeps_object_class_keys_and_weights_and_unwrap_gives_all_back():
    vit = make_vit()
    before, weights = state_of(vit), {k: v.clone() for k, v in vit.state_dict().items()}
    expected = vit(IMAGE)
    assert adaptok.wrap(vit, chunker="dc", budget=0.5) is vit
    assert type(vit).__name__ == "VisionTransformer"
    assert adaptok.is_wrapped(vit)
    new = [key for key in vit.state_dict() if key not in weights]
    assert new
    assert all(".adaptok." in key for key in new)
    assert [key for key in vit.state_dict() if ".adaptok." not in key] == list(weights)
    assert not torch.allclose(vit(IMAGE), expected)
    assert adaptok.unwrap(vit) is vit
    assert state_of(vit) == before
    assert all(torch.equal(vit.state_dict()[key], value) for key, value in weights.items())
    assert torch.equal(vit(IMAGE), expected)


def test_everything_kept_is_bit_for_bit_the_host_with_every_part_run():
    vit = make_vit()
    expected = vit(IMAGE)
    adaptok.wrap(vit, chunker="dc", budget=1.0)
    calls = count_calls(vit)
    assert torch.equal(vit(IMAGE), expected)
    with adaptok.budget(vit, drop=0.0):
        assert torch.equal(vit(IMAGE), expected)
    assert calls == {"router": 2, "chunker": 2, "dechunker": 2}


def count_calls(vit):
    calls = {"router": 0, "chunker": 0, "dechunker": 0}
    stage = vit.blocks.adaptok["dc"]

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name in calls:
        getattr(stage, name).register_forward_hook(count(name))
    return calls


def test_the_natural_budget_of_a_fresh_wrap_keeps_every_cell_and_says_so_once():
    vit = make_vit()
    expected = vit(IMAGE)
    with pytest.warns(FullBudgetWarning, match=r"budget=0\.5.*adaptok tune") as seen:
        adaptok.wrap(vit, chunker="dc")
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adaptok.trace(vit) as trace:
            assert torch.equal(vit(IMAGE), expected)
    assert trace.steps[0].kept.tolist() == [24, 24, 24]


def test_repr_shows_chunker_budget_layout_and_span():
    text = repr(make_wrapped(span=(1, 3)))
    assert "chunker='dc'" in text
    assert "budget=keep=0.5" in text
    assert "layout='bucketed'" in text
    assert "span=(1, 3)" in text


def test_dropped_cells_change_by_the_update_of_their_token_and_kept_ones_take_it_whole():
    """Against a loop over samples and cells with the host's own blocks."""
    vit = make_wrapped(router="norm", budget=0.4).eval()
    seen = []
    vit.blocks.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with adaptok.trace(vit) as trace, torch.no_grad():
        vit(IMAGE)
    (x, out), plan = seen[0], trace.steps[0].plans[0]
    blocks = vit.blocks.blocks
    for i in range(3):
        kept = plan.keep_mask[i].nonzero().flatten()
        assert len(kept) == 10
        h = torch.cat([x[i, :1], x[i, 1:][kept]])[None]
        with torch.no_grad():
            for block in blocks:
                h = block(h)
        torch.testing.assert_close(out[i, 0], h[0, 0], atol=1e-5, rtol=0)
        cells = [(c // 6, c % 6) for c in range(24)]
        for cell in range(24):
            near = min(
                range(len(kept)),
                key=lambda j: (
                    sum((a - b) ** 2 for a, b in zip(cells[cell], cells[kept[j]], strict=True)),
                    kept[j].item(),
                ),
            )
            update = h[0, 1 + near] - x[i, 1 + kept[near]]
            wanted = h[0, 1 + near] if cell in kept else x[i, 1 + cell] + update
            torch.testing.assert_close(out[i, 1 + cell], wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("budget", [[0.2, 0.5, 0.9], None])
def test_a_sample_does_not_depend_on_its_batch_mates(budget):
    vit = make_uneven() if budget is None else make_wrapped()
    adaptok.set_budget(vit, keep=budget)
    with torch.no_grad(), adaptok.trace(vit) as trace:
        whole = vit(IMAGE)
        counts = trace.steps[0].kept
        assert counts.max() >= 2 * counts.min(), counts
        masks = trace.steps[0].plans[0].keep_mask
        for i in range(3):
            with adaptok.budget(vit, keep=None if budget is None else budget[i]):
                alone = vit(IMAGE[i : i + 1])
            assert torch.equal(trace.steps[-1].plans[0].keep_mask[0], masks[i])
            torch.testing.assert_close(alone[0], whole[i], atol=1e-5, rtol=0)


def make_uneven():
    """A wrap whose router keeps very different shares of the three images."""
    return make_wrapped(chunker={"name": "dc", "buckets": 12}, router=UnevenRouter(), budget=None)


def test_a_budget_may_be_given_in_every_form():
    for budget, kept in ((0.25, 6), ({"tokens": 7}, 7), (adaptok.Budget(keep=0.5), 12)):
        vit = make_wrapped(budget=budget)
        with adaptok.trace(vit) as trace:
            vit(IMAGE)
        assert trace.steps[0].kept.tolist() == [kept] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"chunker": "dc", "router": "norm"},
        {"chunker": {"name": "dc"}, "router": {"name": "norm"}},
        {"chunker": adaptok.PartConfig(name="dc"), "router": adaptok.PartConfig(name="norm")},
        {"chunker": HostChunker(), "router": "norm", "dechunker": HostDechunker(96)},
    ],
)
def test_names_mappings_configurations_and_instances_are_the_same(options):
    a, b = make_wrapped(router="norm"), make_wrapped(**options)
    assert torch.equal(a(IMAGE), b(IMAGE))


def test_span_runs_the_blocks_around_it_on_all_tokens():
    vit = make_wrapped(span=(1, 2))
    lengths = []
    for block in vit.blocks.blocks:
        block.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    vit(IMAGE)
    assert lengths == [25, 13, 25]


def test_deepcopy_and_pickle_use_their_own_weights():
    vit = make_wrapped()
    expected = vit(IMAGE)
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert torch.equal(other(IMAGE), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        assert torch.equal(vit(IMAGE), expected)
        assert not torch.allclose(other(IMAGE), expected)
        adaptok.set_budget(other, keep=0.25)
        assert vit.blocks.adaptok["dc"].budget_setting.describe() == "keep=0.5"
        adaptok.unwrap(other)
        assert adaptok.is_wrapped(vit)


def test_a_wrapped_model_is_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        vit = make_wrapped()
        vit(IMAGE)
        gone = weakref.ref(vit.blocks)
        del vit
        assert gone() is None
    finally:
        gc.enable()


def test_replaced_blocks_and_moved_weights_survive_unwrap():
    vit = make_wrapped()
    block = make_vit(seed=9).blocks[1]
    vit.blocks[1] = block
    vit.to(torch.float64).train()
    adaptok.unwrap(vit)
    assert vit.blocks[1] is block
    assert vit.blocks.training
    assert vit(IMAGE.double()).dtype == torch.float64


def test_router_and_dechunker_stay_float32_under_half_precision():
    vit = make_wrapped().to(torch.bfloat16)
    own = {k: v for k, v in vit.state_dict().items() if ".adaptok." in k}
    assert {v.dtype for v in own.values()} == {torch.float32}
    assert vit(IMAGE.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert make_wrapped()(IMAGE).isfinite().all()


def test_compile_makes_few_graphs_for_many_budgets_and_the_same_values():
    torch._dynamo.reset()  # graphs of other tests count towards the limit of a host's forward
    vit = make_wrapped().eval()
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(vit, fullgraph=True, backend=backend)
    with torch.no_grad():
        vit(IMAGE)
        for i in range(1, 51):
            adaptok.set_budget(vit, keep=i / 50)
            torch.testing.assert_close(compiled(IMAGE), vit(IMAGE), atol=1e-6, rtol=1e-6)
    assert len(graphs) <= 4
    assert len(graphs) <= vit.blocks.adaptok["dc"].chunker.buckets


def test_export_gives_the_same():
    vit = make_wrapped().eval()
    exported = torch.export.export(vit, (IMAGE,)).module()
    torch.testing.assert_close(exported(IMAGE), vit(IMAGE), atol=1e-6, rtol=1e-6)


def test_gradients_reach_router_gate_and_host():
    vit = make_vit()
    vit.global_pool = "avg"  # reads every cell, so that the dechunker matters
    adaptok.wrap(vit, chunker="dc", budget=0.5).train()
    fill_weights(vit.blocks.adaptok["dc"].router)
    vit(IMAGE).square().mean().backward()
    missing = [n for n, p in vit.named_parameters() if p.grad is None or not p.grad.any()]
    # keys have no use for their bias
    assert [name for name in missing if "adaptok" in name] == []
    assert "blocks.0.mlp.fc1.weight" not in missing


def test_gradient_reaches_the_router_of_a_host_that_reads_only_its_class_token():
    vit = make_wrapped().train()
    vit(IMAGE).square().mean().backward()
    assert vit.blocks.adaptok["dc"].router.logit.weight.grad.any()


def test_gradient_checkpointing_gives_the_same_gradients_and_recomputes_blocks_one_by_one():
    vit = make_wrapped(router={"name": "dc", "prior": "norm"}).train()
    plain = gradients(vit)
    vit.set_grad_checkpointing(True)
    calls = [0] * 3
    router_calls = [0]
    for i, block in enumerate(vit.blocks.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    stage = vit.blocks.adaptok["dc"]
    stage.router.register_forward_pre_hook(
        lambda *_: router_calls.__setitem__(0, router_calls[0] + 1)
    )
    again = gradients(vit)
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-5)
    assert calls == [2, 2, 2]  # forward, and once more for the backward pass
    assert router_calls == [1]  # the list as a whole is never recomputed


def gradients(vit):
    vit.zero_grad()
    vit(IMAGE).square().mean().backward()
    return {n: p.grad.clone() for n, p in vit.named_parameters() if p.grad is not None}


def test_forward_features_works_and_single_blocks_are_refused():
    vit = make_wrapped()
    assert vit.forward_features(IMAGE).shape == (3, 25, 96)
    with pytest.raises(HostOptionError, match=r"forward_intermediates.*adaptok\.unwrap"):
        vit.forward_intermediates(IMAGE)
    assert list(vit.blocks) == [vit.blocks]
    assert vit.blocks[2] is vit.blocks.blocks[2]
    assert vit.blocks[-1:] == vit.blocks.blocks[-1:]
    assert vit.blocks


def test_blocks_called_without_the_host_say_so():
    vit = make_wrapped()
    with pytest.raises(HandOverError, match="call the model itself, not its blocks"):
        vit.blocks(torch.randn(1, 25, 96))


def test_a_wrapped_part_of_a_larger_model_works_and_is_found():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = make_wrapped()

        def forward(self, x):
            return self.vit(x) * 2

    outer = Outer()
    with adaptok.trace(outer) as trace, adaptok.budget(outer, keep=0.25):
        outer(IMAGE)
    assert trace.steps[0].kept.tolist() == [6, 6, 6]
    assert not adaptok.is_wrapped(adaptok.unwrap(outer))


def test_random_numbers_and_train_modes_are_as_before():
    vit = make_vit()
    vit.train()
    vit.blocks[1].eval()
    modes = [module.training for module in vit.modules()]
    part = adaptok.Router
    del part
    router, chunker, dechunker = HostRouter(96), HostChunker(), HostDechunker(96)
    state = torch.random.get_rng_state()
    adaptok.wrap(vit, chunker=chunker, router=router, dechunker=dechunker, budget=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    adaptok.unwrap(vit)
    assert [module.training for module in vit.modules()] == modes
