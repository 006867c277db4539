"""Z-Image of diffusers: image, text and padding in one sequence."""

from dataclasses import replace

import pytest
import torch
from backbones.diffusers_checks import (
    call,
    change_inputs,
    change_token_inputs,
    check_oracle,
    check_oracles,
    find,
    wrap_host,
)

import adaptok
from adaptok.backbones.diffusers_zimage import DiffusersZImage
from adaptok.errors import HostOptionError, ProbeError, ShapeError
from adaptok.hosts import HostInputs


def make_inputs(size=(1, 10, 14), texts=(5, 40, 9), b=3):
    generator = torch.Generator().manual_seed(4)
    images = [torch.randn(4, *size, generator=generator) for _ in range(b)]
    features = [torch.randn(n, 20, generator=generator) for n in texts]
    return HostInputs((images, torch.linspace(0.1, 0.9, b), features))


def test_facts():
    host = DiffusersZImage.match(find("z_image").build())
    assert (host.width, host.depth, host.grid_axes) == (48, 4, 2)


def test_example_has_masked_padding():
    """Texts of the example are padded to different lengths, so that the probe sees a mask."""
    model, masks = wrap_host("z_image", budget=1.0), []
    model.layers.register_forward_pre_hook(lambda _, args: masks.append(args[1]))
    inputs = DiffusersZImage.match(find("z_image").build()).example(model)
    with torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
    assert masks[0].sum(1).unique().numel() == 2


def test_equal_lengths_have_no_mask():
    """Texts that are padded to one length: the host gives no mask."""
    model = wrap_host("z_image", budget=[0.2, 0.5, 1.0])
    masks = []
    model.layers.register_forward_pre_hook(lambda _, args: masks.append(args[1]))
    inputs = make_inputs(texts=(5, 12, 9))
    with torch.no_grad():
        whole = model(*inputs.args).sample
        for sample, keep in enumerate((0.2, 0.5, 1.0)):
            one = (part[sample : sample + 1] for part in inputs.args)
            with adaptok.budget(model, keep=keep):
                (alone,) = model(*one).sample
            torch.testing.assert_close(alone, whole[sample], rtol=0, atol=1e-5)
    assert masks == [None] * 4


def test_cells_that_need_no_padding():
    """A grid of 32 cells: text begins right behind the image."""
    model = wrap_host("z_image", budget=[0.2, 0.5, 1.0])
    inputs = make_inputs(size=(1, 8, 16), texts=(5, 64, 9))
    with torch.no_grad(), adaptok.trace(model) as trace:
        whole = model(*inputs.args).sample
        assert trace.steps[0].grid == (4, 8)
        with adaptok.budget(model, keep=0.5):
            one = (part[1:2] for part in inputs.args)
            (alone,) = model(*one).sample
    torch.testing.assert_close(alone, whole[1], rtol=0, atol=1e-5)


def test_frames_make_a_grid_of_three_axes():
    model = wrap_host("z_image")
    with torch.no_grad(), adaptok.trace(model) as trace:
        model(*make_inputs(size=(3, 4, 6)).args)
    assert trace.steps[0].grid == (3, 2, 3)


def test_arguments_by_name():
    model = wrap_host("z_image")
    images, times, texts = make_inputs().args
    with torch.no_grad():
        by_name = model(x=images, t=times, cap_feats=texts, patch_size=2, return_dict=False)[0]
        by_place = model(images, times, texts).sample
    assert all(torch.equal(a, b) for a, b in zip(by_name, by_place, strict=True))


@pytest.mark.parametrize("change", ["start", "rows"])
def test_twin_with_wrong_rotary_rows_is_caught(change):
    def shift(value):
        if change == "start":
            return replace(value, start=value.value.shape[1] - 35)
        return replace(value, value=value.value.roll(1, 1))

    host = change_token_inputs(DiffusersZImage, shift)
    if change == "rows":
        with pytest.raises(ProbeError, match="differs by"):
            wrap_host("z_image", host)
        return
    model = wrap_host("z_image", host, verify=False)
    with pytest.raises(AssertionError):
        check_oracle("z_image", model, 0.5)


def test_twin_that_takes_text_for_cells_is_caught():
    """Cells behind the text, as Lumina has them: with every cell kept, all is as it was."""

    def turn(call):
        start = call.x.shape[1] - call.num_cells
        inputs = {key: replace(value, start=start) for key, value in call.token_inputs.items()}
        return replace(call, start=start, token_inputs=inputs)

    model = wrap_host("z_image", change_inputs(DiffusersZImage, turn))
    with pytest.raises(AssertionError):
        check_oracle("z_image", model, 0.5)


def test_twin_that_forgets_the_mask_is_caught():
    def forget(call):
        inputs = {k: v for k, v in call.token_inputs.items() if k != "attn_mask"}
        return replace(call, token_inputs=inputs)

    with pytest.raises(ProbeError, match="differs by"):
        wrap_host("z_image", change_inputs(DiffusersZImage, forget))


def test_twin_with_the_mask_of_another_sample_is_caught():
    def turn(value):
        return replace(value, value=value.value.flip(0)) if value.value.ndim == 2 else value

    with pytest.raises(ProbeError, match="differs by"):
        wrap_host("z_image", change_token_inputs(DiffusersZImage, turn))


def test_images_of_different_sizes_are_refused():
    model = wrap_host("z_image")
    images, times, texts = make_inputs().args
    images[1] = torch.zeros(4, 1, 14, 10)
    with pytest.raises(ShapeError, match=r"have one size, got \(1, 10, 14\), \(1, 14, 10\)"):
        model(images, times, texts)
    with torch.no_grad():  # images of a size, one call each
        model(images[1:2], times[:1], texts[:1])


def test_omni_mode_is_refused():
    images, times, texts = make_inputs().args
    model = wrap_host("z_image")
    with pytest.raises(HostOptionError, match="Z-Image in omni mode puts several images"):
        model([[x] for x in images], times, [[t] for t in texts])


def test_controlnets_are_refused():
    with pytest.raises(HostOptionError, match="controlnet_block_samples reaches into"):
        call("z_image", wrap_host("z_image"), controlnet_block_samples={1: torch.zeros(1)})


def test_refiners_run_on_all_tokens():
    model, seen = wrap_host("z_image"), []
    for layer in (*model.noise_refiner, *model.context_refiner):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    call("z_image", model)
    assert seen == [(3, 64), (3, 64)]


def test_masked_oracle_with_long_text():
    check_oracles("z_image", wrap_host("z_image"))
