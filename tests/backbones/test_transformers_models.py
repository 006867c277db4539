"""Models of transformers around a vision tower, and those that are refused."""

import pytest
import torch
import transformers
from backbones.host_checks import run
from backbones.towers import (
    IMAGES,
    SIZES,
    TEXT,
    build,
    find,
    host_of,
    make_clip,
    make_siglip,
    make_vit,
)
from torch import nn

import adaptok
from adaptok.backbones.transformers_beit import TransformersBeit
from adaptok.backbones.transformers_vit import TransformersViT
from adaptok.errors import HostOptionError, UnsupportedModelError
from adaptok.hosts import NoMatch


class TestTowersInside:
    @pytest.mark.parametrize("make", [make_clip, make_siglip])
    def test_of_images_and_text(self, make):
        model = make()
        ids = torch.tensor([[0, 5, 9, 1], [0, 7, 3, 1], [0, 2, 2, 1]])
        images = {"pixel_values": IMAGES, "interpolate_pos_encoding": True}
        with torch.no_grad():
            expected = model(input_ids=ids, **images).logits_per_image
            pooled = model.get_image_features(**images).pooler_output
        adaptok.wrap(model, "dc", router="norm", budget=1.0, backbone=host_of(model))
        assert {key.split(".adaptok.")[0] for key in model.state_dict() if ".adaptok." in key} == {
            "vision_model.encoder.layers"
        }
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids, **images).logits_per_image, expected)
            with adaptok.budget(model, keep=0.4), adaptok.trace(model) as trace:
                less = model.get_image_features(**images).pooler_output
                model(input_ids=ids, **images)
            assert [step.kept.tolist() for step in trace.steps] == [[14] * 3] * 2
            assert (less - pooled).abs().max() > 0.01
        adaptok.unwrap(model)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids, **images).logits_per_image, expected)

    @pytest.mark.parametrize(
        ("cls", "config", "vision"),
        [
            ("CLIPForImageClassification", "CLIPConfig", "CLIPVisionConfig"),
            ("SiglipForImageClassification", "SiglipConfig", "SiglipVisionConfig"),
        ],
    )
    def test_of_classifiers(self, cls, config, vision):
        tower = getattr(transformers, vision)(**SIZES, image_size=48).to_dict()
        settings = getattr(transformers, config)(vision_config=tower, num_labels=7)
        model = build(getattr(transformers, cls), settings)
        images = torch.randn(2, 3, 48, 48)
        with torch.no_grad():
            expected = model(pixel_values=images).logits
            adaptok.wrap(model, "dc", budget=1.0, backbone=host_of(model))
            assert torch.equal(model(pixel_values=images).logits, expected)
            with adaptok.budget(model, keep=0.3):
                assert not torch.allclose(model(pixel_values=images).logits, expected, atol=1e-3)

    @pytest.mark.parametrize(
        ("cls", "config"),
        [
            ("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
            ("IJepaForImageClassification", "IJepaConfig"),
            ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
            ("ViTForMaskedImageModeling", "ViTConfig"),
            ("BeitForImageClassification", "BeitConfig"),
            ("BeitForMaskedImageModeling", "BeitConfig"),
        ],
    )
    def test_of_other_heads(self, cls, config):
        options = {"image_size": 48} | ({"vocab_size": 20} if "Beit" in cls else {})
        options |= {"encoder_stride": 8, "use_mask_token": True} if "Masked" in cls else {}
        model = build(getattr(transformers, cls), getattr(transformers, config)(**SIZES, **options))
        images = torch.randn(2, 3, 48, 48)
        with torch.no_grad():
            expected = model(images)[0]
            adaptok.wrap(model, "dc", budget=1.0, backbone=host_of(model))
            assert torch.equal(model(images)[0], expected)
            with adaptok.budget(model, keep=0.3):
                assert not torch.allclose(model(images)[0], expected, atol=1e-3)

    def test_a_tower_in_a_stranger_is_not_taken_and_its_place_is_named(self):
        class Stranger(nn.Module):
            def __init__(self):
                super().__init__()
                self.eyes = make_vit()

        with pytest.raises(NoMatch, match=r"ViTModel is a part, at eyes: adaptok.wrap\(model.eyes"):
            TransformersViT.match(Stranger())

    def test_two_towers(self):
        class Two(transformers.ViTModel):
            pass

        model = Two(make_vit().config)
        model.other = make_vit()
        with pytest.raises(UnsupportedModelError, match=r"several vision towers \(, other\)"):
            TransformersViT.match(model)

    def test_of_a_subclass_by_the_user(self):
        class Mine(transformers.ViTForImageClassification):
            def forward(self, pixel_values=None, **kwargs):
                return super().forward(pixel_values.flip(-1), **kwargs).logits

        model = build(Mine, transformers.ViTConfig(**SIZES, image_size=(40, 56), num_labels=3))
        with torch.no_grad():
            expected = model(IMAGES)
            adaptok.wrap(model, "dc", budget=1.0, backbone=host_of(model))
            assert torch.equal(model(IMAGES), expected)


class TestRefusals:
    @pytest.mark.parametrize(
        ("cls", "config"),
        [
            ("Dinov2Backbone", "Dinov2Config"),
            ("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig"),
            ("DINOv3ViTBackbone", "DINOv3ViTConfig"),
            ("BeitBackbone", "BeitConfig"),
        ],
    )
    def test_feature_maps(self, cls, config):
        model = getattr(transformers, cls)(getattr(transformers, config)(**SIZES, image_size=48))
        message = f"{cls} hands out the features of single blocks.*{cls.replace('Back', '.*')[:6]}"
        with pytest.raises(UnsupportedModelError, match=message):
            host_of(model)

    def test_masked_autoencoder_that_drops_cells(self):
        config = transformers.ViTMAEConfig(**SIZES, image_size=48)
        with pytest.raises(UnsupportedModelError, match=r"drops 75% .* set config.mask_ratio = 0"):
            TransformersViT.match(transformers.ViTMAEModel(config))

    def test_masked_autoencoder_that_shuffles_cells(self):
        case = find("vit_mae")
        model = case.build()
        adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
        images = case.inputs(model).kwargs["pixel_values"]
        with pytest.raises(HostOptionError, match="shuffles its cells"):
            model(images)
        with pytest.raises(HostOptionError, match="shuffles its cells"):
            model(images, noise=torch.rand(3, 35))
        model.config.mask_ratio = 0.5
        with pytest.raises(HostOptionError, match=r"set config\.mask_ratio = 0"):
            run(case, model, case.inputs(model))

    def test_models_of_other_libraries_and_text(self):
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
        for model in (nn.Linear(2, 2), text):
            with pytest.raises(NoMatch, match="none of ViTModel"):
                TransformersViT.match(model)

    def test_other_layouts_of_a_known_class(self):
        model = make_vit()
        model.layers = nn.ModuleList()
        with pytest.raises(UnsupportedModelError, match="laid out in another way"):
            TransformersViT.match(model)

    def test_blocks_of_a_subclass_have_no_form(self):
        from transformers.models.beit.modeling_beit import BeitLayer

        class Mine(BeitLayer):
            pass

        model = find("beit").build()
        model.layers[1] = Mine(model.config)
        with pytest.raises(UnsupportedModelError, match="a block is a Mine"):
            TransformersBeit.match(model)

    def test_hooks_on_blocks_whose_form_is_run(self):
        case = find("beit")
        model = case.build()
        adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
        handle = model.layers[1].register_forward_hook(lambda *_: None)
        with pytest.raises(HostOptionError, match="a hook listens to BeitLayer"):
            run(case, model, case.inputs(model))
        handle.remove()
        run(case, model, case.inputs(model))
