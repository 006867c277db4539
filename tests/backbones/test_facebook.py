"""Models in the layout of DiT's and SiT's research code."""

from functools import partial

import pytest
import torch
from backbones import host_checks
from backbones.host_checks import find_case, run
from torch import nn
from torch.utils.checkpoint import checkpoint

import adaptok
from adaptok.backbones.facebook_dit import FacebookDiT
from adaptok.dc.baseline import DiT as OwnDiT
from adaptok.dc.config import DiTConfig
from adaptok.errors import HandOverError, UnsupportedModelError
from adaptok.hosts import NoMatch
from adaptok.testing.models import fill_weights
from benchmarks.architectures.facebook_models import DiT, DiTBlock

NAMES = ["dit", "sit"]


def find(name):
    return find_case(f"facebook/{name}")


def run_short(blocks, args, kwargs, rows):
    """Run the blocks on the kept tokens of one sample."""
    x, condition = args
    x = x[:, rows]
    for block in blocks:
        x = block(x, condition)
    return x


def make_wrapped(model, **options):
    options = {"router": "norm", "budget": 0.5} | options
    return adaptok.wrap(model, "dc", backbone=FacebookDiT.match(model), **options)


@pytest.mark.parametrize("name", NAMES)
def test_identity_keys_and_unwrap(name):
    host_checks.check_identity_keys_and_unwrap(find(name), FacebookDiT.match)


@pytest.mark.parametrize("name", NAMES)
def test_copies(name):
    host_checks.check_copies(find(name), FacebookDiT.match)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    kept = host_checks.check_batch_invariance(find(name), FacebookDiT.match)
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("name", NAMES)
def test_router_learns(name):
    host_checks.check_router_gradient(find(name), FacebookDiT.match)


def test_compiles_as_one_graph():
    host_checks.check_compile(find("dit"), FacebookDiT.match)


@pytest.mark.parametrize("name", NAMES)
def test_kept_tokens_are_what_the_host_computes_of_them_alone(name):
    case = find(name)
    model = make_wrapped(case.build())
    host_checks.check_loop_oracle(case, model, case.inputs(model), run_short)


def test_condition_of_another_sample_does_not_pass_the_oracle():
    class Twin(FacebookDiT):
        def read(self, numbers, args, kwargs):
            x, condition = args
            return super().read(numbers, (x, condition.roll(1, 0)), kwargs)

    case = find("dit")
    model = case.build()
    with pytest.raises(adaptok.errors.ProbeError, match="DiT differs by"):
        adaptok.wrap(model, "dc", budget=0.5, backbone=Twin.match(model))


def test_condition_of_the_first_samples_does_not_pass_the_oracle():
    class Twin(FacebookDiT):
        def run(self, block, index, call):
            rows = slice(None) if call.cells is None else slice(0, call.x.shape[0])
            whole = getattr(self, "whole", call.condition)
            self.whole = whole if len(whole) >= len(call.condition) else call.condition
            return call.with_x(block(call.x, self.whole[rows]))

    case = find("dit")
    model = case.build()
    adaptok.wrap(model, "dc", router="norm", backbone=Twin.match(model), budget=0.5, verify=False)
    model.blocks.backbone.whole = None
    del model.blocks.backbone.whole
    run(case, model, case.inputs(model))  # the whole batch first
    with pytest.raises(AssertionError, match="not close"):
        host_checks.check_loop_oracle(case, model, case.inputs(model), run_short)


@pytest.mark.parametrize("patch", [(1, 1), (2, 1)])
def test_other_patches_are_noticed(patch):
    case = find("dit")
    model = case.build()
    host = FacebookDiT.match(model)
    host.patch = patch
    adaptok.wrap(model, "dc", budget=0.5, backbone=host, verify=False)
    with pytest.raises(HandOverError, match=r"tokens of the grid \(\d+, 14\)"):
        run(case, model, case.inputs(model))


class TestGuidance:
    def make_inputs(self, b=2):
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(2 * b, 4, 10, 14, generator=generator)
        y = torch.cat([torch.arange(b), torch.full((b,), 10)])
        return x, torch.full((2 * b,), 300.0), y, 1.5

    def test_the_plain_method_call_of_the_forward_is_served(self):
        model = find("dit").build()
        inputs = self.make_inputs()
        with torch.no_grad():
            expected = model.forward_with_cfg(*inputs)
            make_wrapped(model, budget=1.0)
            assert torch.equal(model.forward_with_cfg(*inputs), expected)
            with adaptok.budget(model, keep=0.3), adaptok.trace(model) as trace:
                less = model.forward_with_cfg(*inputs)
        assert trace.steps[0].kept.tolist() == [11] * 4
        assert (less - expected).abs().max() > 0.05

    def test_the_first_half_is_conditional(self):
        model = make_wrapped(find("dit").build(), router="dc")
        with adaptok.budget(model, drop=0.0, uncond_drop=0.9), adaptok.trace(model) as trace:
            model.forward_with_cfg(*self.make_inputs())
        assert trace.steps[0].plans[0].requested.tolist() == [35, 35, 4, 4]

    def test_an_odd_batch_has_no_halves(self):
        model = make_wrapped(find("dit").build())
        x, t, y, _ = self.make_inputs()
        with (
            adaptok.budget(model, drop=0.0, uncond_drop=0.9),
            pytest.raises(adaptok.errors.BudgetError, match=r"3 samples.*host told nothing"),
        ):
            model(x[:3], t[:3], y[:3])


class Checkpointed(DiT):
    """A fork that checkpoints its blocks one by one, as research code does."""

    reentrant = False

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = checkpoint(partial(self.call, block), x, c, use_reentrant=self.reentrant)
        return self.unpatchify(self.final_layer(x, c))

    def call(self, block, *inputs):
        return block(*inputs)


def test_a_fork_that_checkpoints_recomputes_each_block_on_few_tokens():
    case = find("dit")
    grads = []
    for cls in (DiT, Checkpointed):
        model = fill_weights(cls((10, 14))).eval()
        make_wrapped(model, budget=[0.2, 0.5, 1.0])
        calls = []
        model.blocks[1].attn.register_forward_hook(
            lambda _, args, out, calls=calls: calls.append(args[0].shape[1])
        )
        case.run(model, case.inputs(model)).square().mean().backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        assert sorted(calls) == sorted([7, 18, 35] * (1 if cls is DiT else 2))
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-6, msg=key)


class TestOtherModels:
    def test_the_fixed_patch_model_of_this_library(self):
        config = DiTConfig(
            hidden_size=96, depth=3, num_heads=3, latent_size=(12, 18), patch_size=2, num_classes=10
        )
        model = fill_weights(OwnDiT(config)).eval()
        x, t, y = torch.randn(3, 4, 8, 12), torch.tensor([10, 400, 900]), torch.tensor([1, 2, 10])
        with torch.no_grad():
            expected = model(x, t, y)
            make_wrapped(model, budget=1.0)
            assert torch.equal(model(x, t, y), expected)
            with adaptok.budget(model, keep=0.25), adaptok.trace(model) as trace:
                model(x, t, y)
        assert trace.steps[0].grid == (4, 6)
        assert trace.steps[0].kept.tolist() == [6] * 3

    def test_without_classes(self):
        class Free(DiT):
            def __init__(self):
                super().__init__((8, 8))
                del self.y_embedder

            def forward(self, x, t):
                x = self.x_embedder(x) + self.pos_embed
                c = self.t_embedder(t)
                for block in self.blocks:
                    x = block(x, c)
                return self.unpatchify(self.final_layer(x, c))

        model = make_wrapped(fill_weights(Free()).eval())
        with adaptok.trace(model) as trace:
            model(torch.randn(1, 4, 8, 8), torch.tensor([5.0]))
        assert trace.steps[0].kept.tolist() == [8]

    def test_a_convolution_as_patch_embedding_says_its_stride(self):
        model = DiT((8, 8))
        model.x_embedder = nn.Conv2d(4, 96, 2, 2)
        del model.patch_size
        assert FacebookDiT.match(model).patch == (2, 2)
        model.x_embedder = nn.Sequential(nn.Conv2d(4, 96, 2, 2))
        with pytest.raises(UnsupportedModelError, match="says its patch_size"):
            FacebookDiT.match(model)
        model.x_embedder = nn.Identity()
        with pytest.raises(UnsupportedModelError, match="no convolution and no linear layer"):
            FacebookDiT.match(model)

    def test_blocks_that_take_more(self):
        class TextBlock(DiTBlock):
            def forward(self, x, text, c):
                return x

        model = DiT((8, 8))
        model.blocks[0] = TextBlock(96, 3)
        with pytest.raises(UnsupportedModelError, match=r"TextBlock needs 3 arguments.*its own"):
            FacebookDiT.match(model)

    def test_blocks_that_get_more(self):
        class RopeBlock(DiTBlock):
            def forward(self, x, c, rope=None):
                return super().forward(x, c)

        class Rope(DiT):
            def forward(self, x, t, y):
                x = self.x_embedder(x) + self.pos_embed
                c = self.t_embedder(t) + self.y_embedder(y, self.training)
                for block in self.blocks:
                    x = block(x, c, rope=self.pos_embed)
                return self.unpatchify(self.final_layer(x, c))

        model = Rope((8, 8))
        for i in range(4):
            model.blocks[i] = RopeBlock(96, 3)
        with pytest.raises(HandOverError, match=r"got 2 arguments and rope.*backbone of its own"):
            adaptok.wrap(model, "dc", budget=0.5, backbone=FacebookDiT.match(model))
        assert not adaptok.is_wrapped(model)

    def test_more_tokens_than_cells(self):
        class Registers(DiT):
            def forward(self, x, t, y):
                x = self.x_embedder(x) + self.pos_embed
                x = torch.cat([x[:, :2], x], dim=1)
                c = self.t_embedder(t) + self.y_embedder(y, self.training)
                for block in self.blocks:
                    x = block(x, c)
                return self.unpatchify(self.final_layer(x[:, 2:], c))

        model = Registers((8, 8))
        with pytest.raises(HandOverError, match=r"16 tokens of the grid \(4, 4\)"):
            adaptok.wrap(model, "dc", budget=0.5, backbone=FacebookDiT.match(model))

    def test_a_forward_that_needs_more(self):
        class Text(DiT):
            def forward(self, x, t, y, text, mask):
                return super().forward(x, t, y)

        model = Text((8, 8))
        with pytest.raises(UnsupportedModelError, match="forward of Text needs 5 arguments"):
            adaptok.wrap(model, "dc", budget=0.5, backbone=FacebookDiT.match(model))
        adaptok.wrap(model, "dc", budget=0.5, backbone=FacebookDiT.match(model), verify=False)

    def test_video(self):
        model = make_wrapped(find("dit").build())
        with pytest.raises(HandOverError, match=r"takes latents \(b, c, h, w\), got \(1, 4, 2"):
            model.x_embedder(torch.randn(1, 4, 2, 10, 14))

    def test_others(self):
        with pytest.raises(NoMatch, match="no x_embedder, t_embedder, blocks, final_layer, as DiT"):
            FacebookDiT.match(nn.Linear(2, 2))
        model = DiT((8, 8))
        del model.t_embedder
        with pytest.raises(NoMatch, match="no t_embedder, as DiT"):
            FacebookDiT.match(model)
