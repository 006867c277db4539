"""A wrapped model inside the program of somebody else: threads, copies, several of them, hooks."""

import copy
import pickle
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import adaptok
from adaptok.errors import HandOverError, UnsupportedModelError, WrapError
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights

IMAGES = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def make_square(**options):
    """Return a filled ViT of one image size, which takes an empty batch, too."""
    made = timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=64, num_classes=10, **options
    )
    return fill_weights(made).eval()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = (fill_weights(make_vit()).eval() for _ in range(2))

    def forward(self, image):
        return self.left(image) + self.right(image)


@pytest.fixture
def pair():
    made = Pair()
    adaptok.wrap(made.left, "dc", budget=0.5)
    adaptok.wrap(made.right, "dc", budget=0.25)
    return made


@pytest.fixture
def quick_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_threads_do_not_read_the_grids_of_each_other(quick_switches):
    model = adaptok.wrap(fill_weights(make_vit()).eval(), "dc", budget=0.5)
    images = [torch.randn(2, 3, h, w) for h, w in ((32, 64), (64, 32), (32, 48))]
    with torch.no_grad():
        expected = [model(image) for image in images]
    found = Counter()

    def run(place):
        for _ in range(30):
            try:
                with torch.no_grad():
                    same = torch.equal(model(images[place]), expected[place])
                found[str(same)] += 1
            except HandOverError as error:
                found[str(error)[:60]] += 1

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"True": 90}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_in_no_context_of_the_original(copied):
    model = adaptok.wrap(make_vit(), "dc", budget=0.5)
    image = torch.randn(1, 3, 32, 48)
    with adaptok.trace(model) as seen, adaptok.request(model, "one", branch="cond"):
        other = copied(model)
        other(image)
        assert not seen.steps
        model(image)
    assert len(seen.steps) == 1
    assert other.blocks.observers == ()
    assert other.blocks.request is None


def test_losses_are_summed_over_all_wrapped_models(pair):
    image = torch.randn(2, 3, 32, 48)
    with adaptok.collect_losses(pair) as both:
        pair(image)
    parts = []
    for one in (pair.left, pair.right):
        with adaptok.collect_losses(one) as losses:
            one(image)
        parts.append(losses["ratio"])
    assert min(parts) > 0
    torch.testing.assert_close(both["ratio"], parts[0] + parts[1])


def test_plain_sets_the_stages_of_all_aside(pair):
    image = torch.randn(2, 3, 32, 48)
    twin = copy.deepcopy(pair)
    adaptok.unwrap(twin.left), adaptok.unwrap(twin.right)
    with torch.no_grad():
        assert not torch.allclose(pair(image), twin(image), atol=1e-3)
        with adaptok.tracing.plain(pair):
            torch.testing.assert_close(pair(image), twin(image), rtol=0, atol=1e-6)


def test_one_of_several_is_asked_for_by_name(pair, tmp_path):
    wanted = "holds 2 wrapped models, whose blocks are at left.blocks, right.blocks: give the one"
    with pytest.raises(WrapError, match=wanted), adaptok.trace(pair):
        pass
    with pytest.raises(WrapError, match=wanted):
        adaptok.save(pair, tmp_path / "both")
    with pytest.raises(WrapError, match=wanted):
        adaptok.benchmark(pair, torch.randn(1, 3, 32, 48), budgets=(0.5,))
    assert adaptok.is_wrapped(pair)
    adaptok.unwrap(pair)
    assert not adaptok.is_wrapped(pair)


@pytest.mark.parametrize("listen", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_list_itself_are_refused(listen):
    model = make_vit()
    handle = getattr(model.blocks, listen)(lambda *args: None)
    with pytest.raises(UnsupportedModelError, match="blocks has hooks of its own, which would not"):
        adaptok.wrap(model, "dc", budget=0.5)
    assert not adaptok.is_wrapped(model)
    handle.remove()
    adaptok.wrap(model, "dc", budget=0.5)
    seen = []
    getattr(model.blocks, listen)(lambda module, args, *out: seen.append(args[0].shape))
    model(torch.randn(1, 3, 32, 48))
    assert len(seen) == 1


@pytest.mark.parametrize("how", [{"chunker": "dc", "budget": 0.5}, {"stack": ["tome"]}], ids=str)
def test_an_empty_batch_gives_an_empty_answer(how):
    model = adaptok.wrap(make_square(), **how)
    assert model(IMAGES[:0]).shape == (0, 10)


def test_budgets_come_as_arrays_too():
    model = adaptok.wrap(make_square(), "dc", budget=0.5)
    with adaptok.budget(model, keep=np.array([0.5, 0.25, 1.0])), adaptok.trace(model) as seen:
        model(IMAGES[:3])
    assert seen.steps[0].kept.tolist() == [8, 4, 16]


def test_compiled_batches_of_all_sizes_share_graphs():
    torch._dynamo.reset()
    model, counter = adaptok.wrap(make_square(), "dc", budget=0.5), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for b in range(2, 7):
            torch.testing.assert_close(compiled(IMAGES[:b]), model(IMAGES[:b]))
    assert counter.frame_count <= 2  # one for a first size, one for all others


def test_an_exported_model_takes_other_batches_compiled():
    model = adaptok.wrap(make_square(dynamic_img_size=False), "dc", budget=0.5)
    free = {"x": {0: torch.export.Dim("b", min=2, max=8)}}
    exported = torch.export.export(model, (IMAGES[:3],), dynamic_shapes=free, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(IMAGES), model(IMAGES))


def test_a_model_around_a_host_is_told_where_the_host_is():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_vit()

    with pytest.raises(UnsupportedModelError, match="its part net is a VisionTransformer, which"):
        adaptok.wrap(Around(), "dc", budget=0.5)


def test_the_budget_of_the_unconditional_half_is_saved(tmp_path):
    from adaptok.dc.baseline import DiT
    from adaptok.dc.config import DiTConfig

    config = DiTConfig(hidden_size=64, depth=2, num_heads=2, latent_size=8, num_classes=4)
    model = adaptok.wrap(DiT(config), "dc", budget=0.5)
    adaptok.set_budget(model, drop=0.2, uncond_drop=0.9)
    adaptok.save(model, tmp_path / "adapter")
    other = adaptok.load(DiT(config), tmp_path / "adapter")
    stage = other.blocks.adaptok["dc"]
    assert (stage.budget_setting.drop, stage.uncond_setting.drop) == (0.2, 0.9)


def test_collected_features_of_blocks_are_not_lost():
    class Collecting(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.patches = nn.Conv2d(3, 32, 8, stride=8)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
                for _ in range(4)
            )
            self.answer = answer

        def forward(self, image):
            x = self.patches(image).flatten(2).transpose(1, 2)
            seen = []
            for index, block in enumerate(self.blocks):
                x = block(x)
                if index in (1, 2):
                    seen.append(x)
            return self.answer(x.mean(1), seen)

    host = adaptok.ListBackbone(blocks="blocks", grid=(4, 6), prefix=0)
    for answer in (
        lambda x, seen: (x, seen),
        lambda x, seen: {"x": x} | ({"auxiliary": sum(seen)} if seen else {}),
    ):
        model = fill_weights(Collecting(answer)).eval()
        with pytest.raises(adaptok.errors.ProbeError, match="collects something behind single"):
            adaptok.wrap(model, "dc", budget=0.5, backbone=host)
        assert not adaptok.is_wrapped(model)
