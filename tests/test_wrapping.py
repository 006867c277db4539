import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import adaptok
from adaptok.dc.host import HostChunker, HostDechunker, HostRouter
from adaptok.errors import (
    AlreadyWrappedError,
    ConfigError,
    FullBudgetWarning,
    HandOverError,
    HostOptionError,
    NotWrappedError,
    ProbeError,
    RoutingError,
    StackError,
    UnknownNameError,
    UnsupportedModelError,
    WrapError,
)
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights

IMAGE = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(5))


def make_wrapped(**options):
    return adaptok.wrap(make_vit(), **({"chunker": "dc", "budget": 0.5} | options))


def state_of(model):
    """All that must be as it was: modules, attributes, hooks, weights."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: len(module._forward_pre_hooks) + len(module._forward_hooks)
            for name, module in model.named_modules()
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "keys": list(model.state_dict()),
        "ids": {name: id(module) for name, module in model.named_modules()},
    }


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


class UnevenRouter(adaptok.Router):
    """Keeps of each image a share that depends on the image."""

    def forward(self, tokens, context):
        norm = tokens.x.norm(dim=-1)
        share = (tokens.x.mean((1, 2)) * 1e4).frac()[:, None]
        place = norm.argsort(1).argsort(1) / norm.shape[1]
        return adaptok.Routing((0.5 * share - place + 0.5).clamp(0, 1))


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


class BadRouter(adaptok.Router):
    def __init__(self, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.answer = answer

    def forward(self, tokens, context):
        return self.answer(self, tokens.x.norm(dim=-1).sigmoid())


class CountingChunker(HostChunker):
    """Keeps everything, whatever the budget."""

    def forward(self, tokens, routing, budget):
        return super().forward(tokens, routing, adaptok.Budget(keep=1.0))


class ShiftingDechunker(HostDechunker):
    def forward(self, chunks, plan, before):
        after = super().forward(chunks, plan, before)
        return after.with_x(after.x + 1e-3)


class ShortDechunker(HostDechunker):
    def forward(self, chunks, plan, before):
        return chunks


REFUSED = {
    "nothing": ({}, WrapError, "nothing was asked for"),
    "router alone": ({"router": "norm"}, (WrapError, ConfigError), "give a chunker|chunker= too"),
    "unknown chunker": ({"chunker": "dcc"}, UnknownNameError, "did you mean 'dc'"),
    "unknown option": (
        {"chunker": {"name": "dc", "bucket": 3}},
        ConfigError,
        "bucket: this option",
    ),
    "wrong type": ({"chunker": {"name": "dc", "buckets": "x"}}, ConfigError, "buckets"),
    "no name": ({"chunker": {"layout": "fixed"}}, ConfigError, "needs a name"),
    "no spec": ({"chunker": 3}, ConfigError, "a chunker is a name"),
    "a class": ({"chunker": HostChunker}, ConfigError, "make an instance"),
    "span outside": ({"chunker": "dc", "span": (1, 4)}, WrapError, "outside the 3 blocks"),
    "span empty": ({"chunker": "dc", "span": (2, 2)}, WrapError, "first < last"),
    "span no pair": ({"chunker": "dc", "span": 3}, WrapError, "pair of blocks"),
    "keep nothing": (
        {"chunker": "dc", "budget": 0.0},
        ValueError,
        r"keep is a fraction in \(0, 1\]",
    ),
    "no tokens": ({"chunker": "dc", "budget": {"tokens": 0}}, ValueError, "at least 1"),
    "odd budget": ({"chunker": "dc", "budget": {"share": 0.5}}, ValueError, "keep, tokens or drop"),
    "unknown backbone": (
        {"chunker": "dc", "backbone": "vit"},
        UnknownNameError,
        "no backbone 'vit'",
    ),
    "no backbone": ({"chunker": "dc", "backbone": 3}, ConfigError, "backbone is a name"),
    "wrong backbone": (
        {"chunker": "dc", "backbone": "list"},
        UnsupportedModelError,
        "does not fit",
    ),
    "NaN": (
        {"chunker": "dc", "router": BadRouter(lambda _, p: adaptok.Routing(p * float("nan")))},
        RoutingError,
        "no number",
    ),
    "wrong shape": (
        {"chunker": "dc", "router": BadRouter(lambda _, p: adaptok.Routing(p[:, 1:]))},
        RoutingError,
        r"\(2, 23\).*\(2, 24\)",
    ),
    "no routing": (
        {"chunker": "dc", "router": BadRouter(lambda _, p: p)},
        RoutingError,
        "answered with a Tensor",
    ),
    "above one": (
        {"chunker": "dc", "router": BadRouter(lambda _, p: adaptok.Routing(p * 9))},
        RoutingError,
        "through a sigmoid",
    ),
    "keeps all": ({"chunker": CountingChunker()}, ProbeError, "would not save a token"),
    "not the identity": (
        {"chunker": "dc", "dechunker": ShiftingDechunker(96)},
        ProbeError,
        r"with every cell kept.*differs by .*e-0",
    ),
    "too short": (
        {"chunker": "dc", "dechunker": ShortDechunker(96)},
        ValueError,
        "one token per cell",
    ),
    "wrong width": ({"chunker": "dc", "router": HostRouter(64)}, ValueError, "made for 64 .* 96"),
    "no part": ({"stack": ["nothing-such"]}, UnknownNameError, "no stage 'nothing-such'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_wrapped_is_refused_and_the_model_is_as_it_was(case):
    options, error, match = REFUSED[case]
    vit = make_vit()
    before, expected = state_of(vit), vit(IMAGE)
    with pytest.raises(error, match=match):
        adaptok.wrap(vit, **options)
    assert state_of(vit) == before
    assert torch.equal(vit(IMAGE), expected)


def test_a_router_without_gradient_is_refused_where_it_would_be_trained():
    answer = BadRouter(lambda _, p: adaptok.Routing(p.detach()))
    vit = make_wrapped(router=answer)
    vit.eval()(IMAGE)
    vit.train()
    with pytest.raises(RoutingError, match="has no gradient"):
        vit(IMAGE)
    answer.requires_grad_(False)
    vit(IMAGE)


def test_a_second_wrap_and_an_unwrap_of_nothing_are_refused():
    vit = make_wrapped()
    with pytest.raises(AlreadyWrappedError, match="is wrapped already"):
        adaptok.wrap(vit, chunker="dc")
    assert adaptok.is_wrapped(vit)
    adaptok.unwrap(vit)
    for use in (
        adaptok.unwrap,
        lambda m: adaptok.trace(m).__enter__(),
        lambda m: adaptok.collect_losses(m).__enter__(),
        lambda m: adaptok.request(m, "a").__enter__(),
    ):
        with pytest.raises(NotWrappedError, match="VisionTransformer is not wrapped"):
            use(vit)


def test_unsupported_models_are_refused_with_what_was_looked_for():
    with pytest.raises(
        UnsupportedModelError, match=r"no backbone fits .*Linear; looked for"
    ) as seen:
        adaptok.wrap(nn.Linear(2, 2), chunker="dc")
    for name in adaptok.available("backbones"):
        assert f"  {name}: " in str(seen.value)
    with pytest.raises(UnsupportedModelError, match=r"takes a torch\.nn\.Module, got a str"):
        adaptok.wrap("vit", chunker="dc")

    class Pipe:
        transformer = None

    with pytest.raises(UnsupportedModelError, match="pass its transformer"):
        adaptok.wrap(Pipe(), chunker="dc")
    with pytest.raises(UnsupportedModelError, match="before it is compiled"):
        adaptok.wrap(torch.compile(make_vit()), chunker="dc")


def test_a_router_that_only_ranks_needs_a_budget_when_called():
    vit = make_wrapped(router="norm", budget=None)
    with pytest.raises(ValueError, match="only ranks cells"):
        vit(IMAGE)
    adaptok.set_budget(vit, keep=0.5)
    vit(IMAGE)


def test_weights_that_are_not_there_are_probed_at_the_first_call():
    vit = make_vit()
    weights = {k: v.clone() for k, v in vit.state_dict().items()}
    vit.to("meta")
    adaptok.wrap(vit, chunker="dc", budget=0.5, dechunker=ShiftingDechunker(96))
    vit.to_empty(device="cpu")
    fill_weights(vit.blocks.adaptok)
    vit.load_state_dict(weights, strict=False)
    with pytest.raises(ProbeError, match="the first call of a wrapped model differs"):
        vit(IMAGE)
    with pytest.raises(ProbeError, match="differs"):
        vit(IMAGE)

    honest = make_vit().to("meta")
    adaptok.wrap(honest, chunker="dc", budget=0.5)
    honest.to_empty(device="cpu")
    honest.load_state_dict(make_wrapped().state_dict())
    assert honest.blocks.proof is not None
    honest(IMAGE)
    assert honest.blocks.proof is None


def test_verify_false_skips_the_probe():
    vit = make_wrapped(dechunker=ShiftingDechunker(96), verify=False)
    assert vit(IMAGE).isfinite().all()


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
    with pytest.raises(StackError, match="needs every grid cell"):
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
