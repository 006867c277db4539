"""Adapters on disk: what a wrap added, saved, loaded and refused."""

import json
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from adapter_models import IMAGE, is_same, make_trained, state_of
from safetensors.torch import load_file
from torch import nn

import adaptok
from adaptok.adapters import CARD, WEIGHTS, load, save
from adaptok.dc.host import HostRouter
from adaptok.errors import (
    CheckpointError,
    ConfigError,
    FullBudgetWarning,
    NotWrappedError,
    StorageError,
)
from adaptok.testing import make_vit


@pytest.fixture
def folder(tmp_path):
    save(make_trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(params=["bare", "wrapped"])
def model(request):
    """A model that an adapter may be loaded into, and that must not change when that fails."""
    vit = make_vit()
    if request.param == "wrapped":
        adaptok.wrap(vit, "dc", budget=0.7)
    before = state_of(vit)
    yield vit
    assert is_same(state_of(vit), before)


def edit(folder, change):
    card = json.loads((folder / CARD).read_text())
    change(card)
    (folder / CARD).write_text(json.dumps(card))


class TestRoundTrip:
    def test_an_unwrapped_model_becomes_what_was_saved(self, folder):
        vit = make_trained()
        other = make_vit()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(other, folder) is other
        assert torch.equal(other(IMAGE), vit(IMAGE))
        assert repr(other.blocks).count("keep=0.4") == 1
        plain = adaptok.unwrap(other)
        assert torch.equal(plain(IMAGE), make_vit()(IMAGE))

    def test_only_two_plain_files_with_nothing_of_the_host(self, folder):
        assert sorted(path.name for path in folder.iterdir()) == [CARD, WEIGHTS]
        weights = load_file(folder / WEIGHTS)
        vit = make_trained()
        assert list(weights) == sorted(name for name in vit.state_dict() if ".adaptok." in name)
        card = json.loads((folder / CARD).read_text())
        assert card["host"] == {
            "model": "timm.models.vision_transformer.VisionTransformer",
            "backbone": "timm-vit",
            "width": 96,
            "depth": 3,
            "span": [0, 3],
        }
        assert card["wrap"]["chunker"] == {"name": "dc"}
        assert card["adaptok"] == adaptok.__version__

    def test_a_wrapped_model_takes_the_weights_and_keeps_its_budget(self, folder):
        vit = adaptok.wrap(make_vit(), {"name": "dc", "layout": "bucketed"}, budget=0.8)
        load(vit, folder)
        trained = make_trained()
        with adaptok.trace(vit) as trace:
            vit(IMAGE)
        assert trace.steps[0].kept.tolist() == [19] * 3
        adaptok.set_budget(vit, keep=0.4)
        assert torch.equal(vit(IMAGE), trained(IMAGE))

    @pytest.mark.parametrize(
        "options",
        [
            {"router": {"name": "random", "seed": 3}},
            {"router": "norm", "dechunker": {"name": "dc", "sigma": 2.0}, "span": (1, 3)},
            {"chunker": {"name": "dc", "layout": "fixed"}, "budget": {"tokens": 5}},
            {"budget": {"drop": [0.1, 0.5, 0.2]}},
            {"router": HostRouter(96, prior=None)},
        ],
    )
    def test_of_other_wraps(self, options, tmp_path):
        vit = make_trained(**options)
        save(vit, tmp_path / "adapter")
        other = load(make_vit(), tmp_path / "adapter")
        assert torch.equal(other(IMAGE), vit(IMAGE))
        assert other.blocks.span == vit.blocks.span
        assert other.blocks.config == vit.blocks.config

    def test_of_a_natural_budget_without_a_warning(self, tmp_path):
        with pytest.warns(FullBudgetWarning):
            vit = adaptok.wrap(make_vit(), "dc")
        save(vit, tmp_path / "adapter")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other = load(make_vit(), tmp_path / "adapter")
        assert other.blocks.config.budget is None

    def test_the_budget_that_is_set_now_is_saved(self, tmp_path):
        vit = make_trained()
        adaptok.set_budget(vit, drop=0.25)
        save(vit, tmp_path / "adapter")
        assert "drop=0.25" in repr(load(make_vit(), tmp_path / "adapter").blocks)

    def test_saving_again_replaces_and_spares_other_files(self, folder):
        save(make_trained(router="norm"), folder)
        assert json.loads((folder / CARD).read_text())["wrap"]["router"] == {"name": "norm"}
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(StorageError, match=r"holds other files \(notes.txt\)"):
            save(make_trained(), folder)
        assert load(make_vit(), folder).blocks.stages[0].describe()["router"] == "NormRouter"

    def test_train_mode_dtype_and_device_follow_the_model(self, folder):
        vit = load(make_vit().to(torch.bfloat16).train(), folder)
        router = vit.blocks.stages[0].router
        assert router.training
        assert router.logit.weight.dtype == torch.float32
        assert vit(IMAGE.bfloat16()).dtype == torch.bfloat16

    def test_of_a_compiled_model(self, tmp_path):
        vit = make_trained()
        save(torch.compile(vit, backend="eager"), tmp_path / "adapter")
        other = adaptok.wrap(make_vit(), "dc", budget=0.4)
        compiled = torch.compile(other, backend="eager")
        assert load(compiled, tmp_path / "adapter") is compiled
        assert torch.equal(other(IMAGE), vit(IMAGE))
        with pytest.raises(CheckpointError, match=r"this model is a .*OptimizedModule"):
            load(torch.compile(make_vit(), backend="eager"), tmp_path / "adapter")

    def test_in_another_process(self, folder):
        code = """
            import sys, torch, adaptok
            from adaptok.adapters import load
            from adaptok.testing import make_vit
            vit = load(make_vit(), sys.argv[1])
            image = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(5))
            with torch.no_grad():
                print(vit(image).double().abs().sum().item())
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(folder)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(
            make_trained()(IMAGE).double().abs().sum().item(), rel=1e-6
        )
        assert float(done.stdout) != pytest.approx(
            adaptok.wrap(make_vit(), "dc", budget=0.4)(IMAGE).double().abs().sum().item(), rel=1e-6
        )

    def test_of_a_described_list_of_blocks(self, tmp_path):
        def make():
            vit = make_vit()
            host = adaptok.ListBackbone(blocks="blocks", grid=(4, 6), prefix=1)
            return adaptok.wrap(vit, "dc", budget=0.4, backbone=host)

        save(make(), tmp_path / "adapter")
        load(make(), tmp_path / "adapter")
        message = "described by hand is wrapped in the same way first"
        with pytest.raises(CheckpointError, match=message):
            load(make_vit(), tmp_path / "adapter")


class Odd(adaptok.Router):
    def forward(self, tokens, context):
        return adaptok.Routing(tokens.x.norm(dim=-1).sigmoid())


class TestSavingIsRefused:
    def test_of_a_model_that_is_not_wrapped(self, tmp_path):
        with pytest.raises(NotWrappedError, match="is not wrapped"):
            save(make_vit(), tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()

    def test_of_a_part_without_a_name(self, tmp_path):
        vit = adaptok.wrap(make_vit(), "dc", router=Odd(), budget=0.5)
        with pytest.raises(ConfigError, match=r'@adaptok.register_router\("mine"\)'):
            save(vit, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()

    def test_of_weights_on_meta(self, tmp_path):
        vit = make_trained().to("meta")
        with pytest.raises(StorageError, match="lies on the meta device"):
            save(vit, tmp_path / "adapter")

    def test_into_a_file(self, tmp_path):
        (tmp_path / "adapter").write_text("")
        with pytest.raises(StorageError, match="a file of that name is there"):
            save(make_trained(), tmp_path / "adapter")


class TestOtherModels:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_depth(self, folder, wrapped):
        vit = make_vit(depth=4)
        if wrapped:
            adaptok.wrap(vit, "dc", budget=0.5, span=(0, 3))
        message = r"width 96, 3 blocks, span \(0, 3\)\), and this model is .* width 96, 4 blocks"
        with pytest.raises(CheckpointError, match=message):
            load(vit, folder)
        assert adaptok.is_wrapped(vit) is wrapped

    def test_width(self, folder):
        from timm.models.vision_transformer import VisionTransformer

        vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
        with pytest.raises(CheckpointError, match=r"width 96, 3 blocks.*width 48, 3 blocks"):
            load(vit, folder)
        assert not adaptok.is_wrapped(vit)

    def test_class(self, folder):
        message = r"belongs to timm.*VisionTransformer .*this model is a torch.nn.*Linear"
        with pytest.raises(CheckpointError, match=message):
            load(nn.Linear(2, 2), folder)

    def test_a_family_that_has_another_backbone(self, folder, model):
        edit(folder, lambda card: card["wrap"].update(backbone="timm-eva"))
        if adaptok.is_wrapped(model):
            return
        with pytest.raises(CheckpointError, match="the backbone 'timm-eva' does not fit"):
            load(model, folder)


class TestOtherWraps:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"router": "norm"}, "its router is dc .* and this model has norm"),
            ({"chunker": {"name": "dc", "buckets": 3}}, r'its chunker is dc .*"buckets": 16.* 3'),
            ({"dechunker": {"name": "dc", "sigma": 2.0}}, r'its dechunker is dc \{"sigma": 1.0\}'),
            ({"router": Odd()}, "this model has an instance without a name"),
            ({"span": (1, 3)}, r"span \(0, 3\)\), and this model .* span \(1, 3\)"),
        ],
    )
    def test_of_the_same_model(self, folder, options, message):
        vit = make_trained(**options)
        before = state_of(vit)
        with pytest.raises(CheckpointError, match=message):
            load(vit, folder)
        assert is_same(state_of(vit), before)
