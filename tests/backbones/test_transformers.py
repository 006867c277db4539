"""Vision towers of transformers, held against their own blocks on the whole sequence."""

import pytest
import torch
from backbones import host_checks
from backbones.host_checks import KEEP
from backbones.towers import (
    IMAGES,
    find,
    hide_dropped,
    host_of,
    make_dino,
    make_vit,
)

import adaptok
from adaptok.backbones.transformers_vit import TransformersViT
from adaptok.calls import TokenInput
from adaptok.errors import HandOverError, ProbeError

NAMES = [
    "vit",
    "vit_classifier",
    "deit",
    "dinov2",
    "dinov2_classifier",
    "dinov2_registers",
    "dinov3",
    "clip",
    "clip_projection",
    "siglip",
    "ijepa",
    "vit_mae",
    "beit",
]
COMPILED = ["vit_classifier", "dinov3", "clip", "vit_mae", "beit"]


@pytest.mark.parametrize("name", NAMES)
def test_identity_keys_and_unwrap(name):
    host_checks.check_identity_keys_and_unwrap(find(name), host_of)


@pytest.mark.parametrize("name", NAMES)
def test_copies(name):
    host_checks.check_copies(find(name), host_of)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    kept = host_checks.check_batch_invariance(find(name), host_of)
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("name", NAMES)
def test_router_learns(name):
    host_checks.check_router_gradient(find(name), host_of)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name):
    host_checks.check_compile(find(name), host_of)


@pytest.mark.parametrize("name", NAMES)
def test_kept_tokens_are_what_the_host_computes_of_them_alone(name):
    case = find(name)
    model = case.build()
    adaptok.wrap(model, "dc", router="norm", budget=0.5, backbone=host_of(model))
    host_checks.check_loop_oracle(case, model, case.inputs(model), hide_dropped)


class TestTwins:
    """Adapters that are wrong on purpose must not pass."""

    def test_rotation_of_other_cells(self):
        class Twin(TransformersViT):
            def read(self, numbers, args, kwargs):
                cos, sin = kwargs["position_embeddings"]
                turned = (cos.roll(1, 0), sin.roll(1, 0))
                return super().read(numbers, args, kwargs | {"position_embeddings": turned})

        model = make_dino()
        with pytest.raises(ProbeError, match="with every cell kept, DINOv3ViTModel differs by"):
            adaptok.wrap(model, "dc", budget=0.5, backbone=Twin.match(model))
        assert not adaptok.is_wrapped(model)

    def test_rotation_of_the_first_cells_passes_the_probe_and_not_the_oracle(self):
        class FirstRows(TokenInput):
            def take(self, places, n, samples):
                return TokenInput(self.value[:, :, : places.shape[1]], axes=(2,))

        class Twin(TransformersViT):
            def read(self, numbers, args, kwargs):
                call = super().read(numbers, args, kwargs)
                short = {k: FirstRows(v.value, axes=(2,)) for k, v in call.token_inputs.items()}
                object.__setattr__(call, "token_inputs", short)
                return call

        case = find("dinov3")
        model = case.build()
        adaptok.wrap(model, "dc", router="norm", budget=0.5, backbone=Twin.match(model))
        with pytest.raises(AssertionError, match="not close"):
            host_checks.check_loop_oracle(case, model, case.inputs(model), hide_dropped)

    @pytest.mark.parametrize("name", ["vit", "deit", "dinov2_registers", "dinov3"])
    @pytest.mark.parametrize("step", [-1, 1])
    def test_other_prefix(self, name, step):
        model = find(name).build()
        host = TransformersViT.match(model)
        host.prefix += step
        with pytest.raises(HandOverError, match="tokens"):
            adaptok.wrap(model, "dc", budget=0.5, backbone=host)
        assert not adaptok.is_wrapped(model)

    def test_other_prefix_that_nobody_counts_does_not_pass_the_oracle(self):
        class Twin(TransformersViT):
            def read(self, numbers, args, kwargs):
                call = super().read(numbers, args, kwargs)
                object.__setattr__(call, "start", self.prefix - 1)
                return call

        case = find("vit")
        model = case.build()
        adaptok.wrap(model, "dc", router="norm", budget=0.5, backbone=Twin.match(model))
        with pytest.raises(AssertionError, match="not close"):
            host_checks.check_loop_oracle(case, model, case.inputs(model), hide_dropped)

    def test_table_of_the_first_cells(self, monkeypatch):
        from adaptok.backbones import transformers_beit

        def first_rows(call):
            b, s, _ = call.x.shape
            return torch.arange(s).expand(b, s)

        monkeypatch.setattr(transformers_beit, "find_rows", first_rows)
        case = find("beit")
        model = case.build()
        adaptok.wrap(model, "dc", router="norm", budget=0.5, backbone=host_of(model))
        with pytest.raises(AssertionError, match="not close"):
            host_checks.check_loop_oracle(case, model, case.inputs(model), hide_dropped)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "clip", "beit"])
@pytest.mark.parametrize("first", ["checkpointing", "wrap"])
def test_layers_that_checkpoint_themselves(name, first):
    """Each layer is recomputed once, on its few tokens; gradients are those without."""
    case = find(name)
    grads, calls = [], []
    for recompute in (False, True):
        model = case.build().train()
        inputs = case.inputs(model)
        if recompute and first == "checkpointing":
            model.activation_checkpointing_enable({"use_reentrant": False})
        adaptok.wrap(model, "dc", router="norm", budget=list(KEEP), backbone=host_of(model))
        if recompute and first == "wrap":
            model.activation_checkpointing_enable({"use_reentrant": False})
        count = []
        block = model.get_submodule(case.containers[0])[1]
        block.mlp.register_forward_pre_hook(lambda _, args, count=count: count.append(len(args)))
        torch.manual_seed(0)
        case.run(model, inputs).square().mean().backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        calls.append(count)
    assert len(calls[1]) == 2 * len(calls[0])
    assert len(calls[0]) == 3  # three counts of kept tokens, run one after the other
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-6, msg=key)


def test_half_precision():
    model = make_vit().to(torch.bfloat16)
    expected = model(IMAGES).last_hidden_state
    adaptok.wrap(model, "dc", router="norm", budget=1.0, backbone=host_of(model))
    assert torch.equal(model(IMAGES).last_hidden_state, expected)


def test_native_size_where_positions_cannot_be_interpolated():
    host = TransformersViT.match(make_vit())
    assert host.example(make_vit()).kwargs["pixel_values"].shape == (2, 3, 40, 56)
    square = make_vit(image_size=48)
    assert host.example(square).kwargs["pixel_values"].shape == (2, 3, 32, 48)
    assert host.example(square).kwargs["interpolate_pos_encoding"] is True
