"""What vision towers of transformers are called with: masks, options and padded patches."""

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers
from backbones import host_checks
from backbones.host_checks import KEEP, run
from backbones.towers import (
    IMAGES,
    SIZES,
    TEXT,
    build,
    find,
    hide_dropped,
    host_of,
    make_clip,
    make_vit,
)

import adaptok
from adaptok.backbones.transformers_vit import TransformersViT
from adaptok.errors import HandOverError, HostOptionError


class TestMasks:
    def make_mask(self, s):
        valid = torch.ones(3, s, dtype=torch.long)
        valid[0, 5:9] = 0
        valid[2, -6:] = 0
        return valid

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "beit"])
    def test_masks_are_gathered_along_both_axes(self, name, attention):
        case = find(name)
        model = case.build()
        model.set_attn_implementation(attention)
        images = case.inputs(model).kwargs["pixel_values"]
        mask = self.make_mask(36 + case.prefix - 1)
        with torch.no_grad():
            free = model(images).last_hidden_state
            expected = model(images, attention_mask=mask).last_hidden_state
        assert (free - expected).abs().max() > 0.01
        adaptok.wrap(model, "dc", router="norm", budget=1.0, backbone=host_of(model))
        with torch.no_grad():
            assert torch.equal(model(images, attention_mask=mask).last_hidden_state, expected)
        if attention == "eager":
            return  # additive masks: the oracle speaks of bool ones

        def call():
            model(images, attention_mask=mask)

        path = case.containers[0]
        with adaptok.budget(model, keep=list(KEEP)):
            args, kwargs, out, kept = host_checks.record_blocks(model, path, call)
        for i in range(3):
            cells = kept[i].nonzero().flatten() + case.prefix
            rows = torch.cat([torch.arange(case.prefix), cells])
            one = [host_checks.cut(value, i, 3) for value in args]
            named = {key: host_checks.cut(value, i, 3) for key, value in kwargs.items()}
            with torch.no_grad():
                wanted = hide_dropped(model.get_submodule(path).blocks, one, named, rows)
            torch.testing.assert_close(out[i, rows], wanted[0], rtol=0, atol=2e-5)

    def test_padding_masks_of_flash_attention_are_gathered(self):
        model = make_vit()
        host = TransformersViT.match(model)
        numbers = adaptok.HostNumbers((5, 7), start=1)
        mask = self.make_mask(36)
        call = host.read(numbers, (torch.randn(3, 36, 48), mask), {})
        short = call.take(torch.tensor([[4, 5], [0, 1], [33, 34]]))
        assert short.token_inputs["attention_mask"].value.tolist() == [
            [1, 0, 0],
            [1] * 3,
            [1, 0, 0],
        ]

    def test_block_masks_are_refused(self):
        host = TransformersViT.match(make_vit())
        numbers = adaptok.HostNumbers((5, 7), start=1)
        with pytest.raises(HandOverError, match=r'block masks.*set_attn_implementation\("sdpa"\)'):
            host.read(numbers, (torch.randn(3, 36, 48), object()), {})

    def test_other_tensors_are_refused(self):
        model = make_vit()
        adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
        with pytest.raises(HandOverError, match="blocks got position_ids, and it is not known"):
            model(IMAGES, position_ids=torch.arange(36))

    def test_causal_order_is_refused(self):
        model = make_vit()
        adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
        with pytest.raises(HostOptionError, match="is_causal=True orders tokens by their place"):
            model(IMAGES, is_causal=True)


OPTIONS = ["output_hidden_states", "output_attentions"]


class TestCollectedOutputs:
    """Hidden states and attentions of single blocks, in every way of asking."""

    @pytest.fixture(
        params=["vit_classifier", "dinov2_classifier", "dinov3", "clip", "siglip", "beit"]
    )
    def host(self, request):
        case = find(request.param)
        model = case.build()
        # hooks that collect stay on the layers once they were asked for
        before = case.run(model, case.inputs(model))
        collected = model(**case.inputs(model).kwargs, output_hidden_states=True)
        assert len(collected.hidden_states) == 5
        adaptok.wrap(model, "dc", router="norm", budget=0.5, backbone=host_of(model))
        yield case, model, case.inputs(model)
        adaptok.unwrap(model)
        assert torch.equal(case.run(model, case.inputs(model)), before)
        collected = model(**case.inputs(model).kwargs, output_hidden_states=True)
        assert len(collected.hidden_states) == 5

    @pytest.mark.parametrize("option", OPTIONS)
    def test_of_a_call(self, host, option):
        case, model, inputs = host
        for value in (True, [1, -1] if option == "output_hidden_states" else True):
            with pytest.raises(HostOptionError, match=rf"{option}=.*unwrap\(model\) before"):
                model(**inputs.kwargs, **{option: value})
        expected = run(case, model, inputs)
        with torch.no_grad():
            model(**inputs.kwargs, **{option: False})
        assert torch.equal(run(case, model, inputs), expected)

    @pytest.mark.parametrize("option", OPTIONS)
    def test_of_the_configuration(self, host, option):
        case, model, inputs = host
        if option == "output_attentions":
            model.set_attn_implementation("eager")
        expected = run(case, model, inputs)
        setattr(model.config, option, True)
        with pytest.raises(HostOptionError, match=f"{option}=True reaches into single blocks"):
            case.run(model, inputs)
        with torch.no_grad():
            found = case.output(model(**inputs.kwargs, **{option: False}))
        assert torch.equal(found, expected)
        setattr(model.config, option, False)
        model.set_attn_implementation("sdpa")

    def test_of_the_tower_inside(self):
        case = find("vit_classifier")
        model = case.build()
        adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
        with pytest.raises(HostOptionError, match="output_hidden_states=True"):
            model.vit(IMAGES, interpolate_pos_encoding=True, output_hidden_states=True)
        with pytest.raises(HostOptionError, match="output_hidden_states=True"):
            model.vit.forward(IMAGES, interpolate_pos_encoding=True, output_hidden_states=True)

    def test_of_a_model_of_images_and_text(self):
        model = make_clip()
        adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
        images = torch.randn(2, 3, 48, 48)
        with pytest.raises(HostOptionError, match="output_attentions=True"):
            model.get_image_features(images, output_attentions=True)
        model.vision_model.config.output_hidden_states = True
        with pytest.raises(HostOptionError, match="output_hidden_states=True"):
            model.get_image_features(images)
        ids = torch.tensor([[0, 4, 1]])
        text = model.get_text_features(ids, output_hidden_states=True)
        assert len(text.hidden_states) == 5  # the text tower is not wrapped


class TestPaddedPatches:
    """SigLIP 2: patches of images of one grid, with padding behind."""

    @pytest.fixture
    def model(self):
        config = transformers.Siglip2VisionConfig(**SIZES, num_patches=36)
        return build(transformers.Siglip2VisionModel, config)

    def make_inputs(self, padding=6, b=3):
        generator = torch.Generator().manual_seed(2)
        valid = torch.ones(b, 35 + padding, dtype=torch.long)
        valid[:, 35:] = 0
        return {
            "pixel_values": torch.randn(b, 35 + padding, 192, generator=generator),
            "pixel_attention_mask": valid,
            "spatial_shapes": torch.tensor([[5, 7]] * b),
        }

    def test_identity_and_padding(self, model):
        inputs = self.make_inputs()
        with torch.no_grad():
            expected = model(**inputs)
            adaptok.wrap(model, "dc", router="norm", budget=1.0, backbone=host_of(model))
            found = model(**inputs)
            assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
            adaptok.set_budget(model, keep=list(KEEP))
            with adaptok.trace(model) as trace:
                padded = model(**inputs).pooler_output
            assert trace.steps[0].kept.tolist() == [7, 18, 35]
            bare = {k: v[:, :35] if v.shape[1] > 2 else v for k, v in inputs.items()}
            torch.testing.assert_close(model(**bare).pooler_output, padded, rtol=0, atol=1e-5)

    def test_batch_mates_and_oracle(self, model):
        adaptok.wrap(model, "dc", router="norm", budget=list(KEEP), backbone=host_of(model))
        inputs = self.make_inputs()
        with torch.no_grad():
            together = model(**inputs).pooler_output
            for i, keep in enumerate(KEEP):
                with adaptok.budget(model, keep=keep):
                    alone = model(**{k: v[i : i + 1] for k, v in inputs.items()}).pooler_output
                torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)

        @dataclass
        class Case:
            containers = ("encoder.layers",)
            prefix = 0

            def rows(self, sample):
                return range(35)

            def run(self, model, inputs):
                return model(**inputs)

        host_checks.check_loop_oracle(Case(), model, inputs, hide_dropped)

    def test_several_grids_in_one_call(self, model):
        adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
        inputs = self.make_inputs()
        inputs["spatial_shapes"] = torch.tensor([[5, 7], [7, 5], [5, 7]])
        with pytest.raises(
            HostOptionError, match=r"several grids \(\(5, 7\), \(7, 5\)\).*one grid"
        ):
            model(**inputs)

    def test_copies_of_the_whole_model(self):
        text = transformers.Siglip2TextConfig(**TEXT).to_dict()
        vision = transformers.Siglip2VisionConfig(**SIZES, num_patches=36).to_dict()
        config = transformers.Siglip2Config(text_config=text, vision_config=vision)
        model = build(transformers.Siglip2Model, config)
        adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
        other = copy.deepcopy(model)
        ids = torch.tensor([[0, 5, 1]] * 3)
        with torch.no_grad():
            out = model(input_ids=ids, **self.make_inputs()).logits_per_image
            assert torch.equal(other(input_ids=ids, **self.make_inputs()).logits_per_image, out)
