"""Controls of the catalogue: a host that doesn't react can prove nothing about a wrap."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import architectures
from benchmarks.architectures import BATCH, CASES, find_case
from benchmarks.architectures.facebook_models import DiT

TEXT = 7  # text tokens of a joint rotation
OFFERED = [case for case in CASES if case.family != "diffusers-extra"]


WITH_PREFIX = [case for case in CASES if case.prefix]
WITH_SIDE_INPUTS = [case for case in CASES if case.tokenwise]


def name_of(case):
    return case.name


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def host(request):
    """A case with its model, inputs and output; built once for all tests."""
    case = request.param
    model = case.build()
    inputs = case.inputs(model)
    with torch.no_grad():
        return case, model, inputs, case.run(model, inputs)


def find_blocks(case, model):
    return [block for path in case.containers for block in model.get_submodule(path)]


def run_hooked(case, model, inputs, hook, blocks):
    """Run with a hook that may change what enters the blocks."""
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            return case.run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def read_tokens(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


def put_tokens(args, kwargs, tokens):
    if args:
        return (tokens, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": tokens}


def measure_change(output, before):
    return float((output - before).norm() / before.norm())


def test_outputs_are_sound_and_samples_differ(host):
    _, model, _, output = host
    assert not model.training
    assert len(output) == BATCH
    assert output.dtype == torch.float32
    assert output.isfinite().all()
    assert 0.05 < output.abs().mean() < 20
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert measure_change(output[one], output[other]) > 0.05


def test_every_parameter_is_filled(host):
    _, model, _, _ = host
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.abs().max() > 0.01, name
        assert parameter.numel() == 1 or parameter.std() > 1e-3, name
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6


def test_cells_matter(host):
    case, model, inputs, output = host

    def zero_half(block, args, kwargs):
        tokens = read_tokens(args, kwargs).clone()
        for sample in range(BATCH):
            tokens[sample, list(case.rows(sample))[::2]] = 0
        return put_tokens(args, kwargs, tokens)

    changed = run_hooked(case, model, inputs, zero_half, find_blocks(case, model)[:1])
    for sample in range(BATCH):
        assert measure_change(changed[sample], output[sample]) > 0.05


@pytest.mark.parametrize("host", WITH_PREFIX, ids=name_of, indirect=True)
def test_prefix_matters(host):
    case, model, inputs, output = host

    def zero_prefix(block, args, kwargs):
        tokens = read_tokens(args, kwargs).clone()
        tokens[:, : min([case.prefix, *case.begins])] = 0
        return put_tokens(args, kwargs, tokens)

    changed = run_hooked(case, model, inputs, zero_prefix, find_blocks(case, model)[:1])
    assert measure_change(changed, output) > 0.01


@pytest.mark.parametrize("host", WITH_SIDE_INPUTS, ids=name_of, indirect=True)
def test_rows_of_side_inputs_matter(host):
    """One row too far in a rotation, a mask, a bias or a modulation must show."""
    case, model, inputs, output = host
    for place in case.tokenwise:
        moved = []

        def roll(value, length, moved=moved):
            if isinstance(value, tuple):
                return tuple(roll(part, length) for part in value)
            lengths = {len(case.rows(0)), length, length + TEXT}
            axes = [i for i, size in enumerate(value.shape) if size in lengths]
            moved.extend(axes[-1:])
            return value.roll(1, axes[-1]) if axes else value

        def shift(block, args, kwargs, place=place, roll=roll):
            length = read_tokens(args, kwargs).shape[1]
            if isinstance(place, str):
                return args, kwargs | {place: roll(kwargs[place], length)}
            return (*args[:place], roll(args[place], length), *args[place + 1 :]), kwargs

        changed = run_hooked(case, model, inputs, shift, find_blocks(case, model))
        assert moved, place
        assert measure_change(changed, output) > 0.005, place


@pytest.mark.parametrize(
    "host", [c for c in CASES if c not in WITH_SIDE_INPUTS], ids=name_of, indirect=True
)
def test_other_hosts_have_no_side_inputs_with_rows(host):
    case, model, inputs, _ = host
    rows = len(case.rows(0))
    found = []

    def look(block, args, kwargs):
        for value in (*args[1:], *(v for k, v in kwargs.items() if k != "hidden_states")):
            parts = value if isinstance(value, tuple) else (value,)
            found.extend(p for p in parts if isinstance(p, torch.Tensor) and rows in p.shape)

    run_hooked(case, model, inputs, look, find_blocks(case, model))
    assert not found


def test_sequence_holds_prefix_and_cells(host):
    case, model, inputs, _ = host
    seen = []

    def look(block, args, kwargs):
        seen.append(tuple(read_tokens(args, kwargs).shape))

    blocks = find_blocks(case, model)
    run_hooked(case, model, inputs, look, blocks[:1])
    ends = [case.rows(sample).stop for sample in range(BATCH)]
    assert len(seen) == 1
    assert seen[0][:2] == (BATCH, max(ends) + case.after)
    assert len(blocks) >= 4
    for path in case.containers:
        assert isinstance(model.get_submodule(path), nn.ModuleList | nn.Sequential)


def test_batch_of_one_is_the_same(host):
    case, model, inputs, output = host
    for sample in range(BATCH):
        with torch.no_grad():
            alone = case.run(model, case.one(inputs, sample))
        assert len(alone) == 1
        torch.testing.assert_close(alone[0], output[sample], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if c.family == "timm"], ids=name_of)
def test_timm_agrees_on_grid_and_prefix(case):
    model = case.build()
    assert model.num_prefix_tokens == case.prefix
    if not case.grids:
        embed = getattr(model, "patch_embed", None) or model.embeds
        (images,) = case.inputs(model).args
        assert embed.dynamic_feat_size(tuple(images.shape[-2:])) == case.cells


def test_catalogue_is_large_and_its_names_are_unlike():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert len(OFFERED) >= 46
    assert all(case.name.startswith(case.family.removesuffix("-extra") + "/") for case in CASES)
    assert sum(case.cells[-1] != case.cells[-2] for case in OFFERED) >= len(OFFERED) - 1


def test_find_case_takes_full_and_short_names():
    assert find_case("diffusers/flux").name == "diffusers/flux"
    assert find_case("flux").name == "diffusers/flux"
    with pytest.raises(KeyError, match="'dit' names 2 architectures"):
        find_case("dit")
    with pytest.raises(KeyError, match="'nothing' names 0"):
        find_case("nothing")


def test_building_repeats_itself_and_leaves_the_random_state():
    case = find_case("timm/vit_tiny_patch16_224")
    state = torch.get_rng_state()
    first, second = case.build().state_dict(), case.build().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_samples_have_unlike_amounts_of_detail():
    images = find_case("timm/vit_tiny_patch16_224").inputs(nn.Identity()).args[0]
    detail = images.diff(dim=-1).abs().mean((1, 2, 3))
    assert detail[2] > 2 * detail[0]
    assert detail[2] > detail[1] > detail[0]


def test_facebook_layout_guides_the_first_half():
    model = find_case("facebook/dit").build()
    images, times, classes = find_case("facebook/dit").inputs(model).args
    x = torch.cat([images, torch.full_like(images, 9.0)])  # the second half isn't looked at
    t, y = torch.cat([times, times]), torch.cat([classes, torch.full_like(classes, 10)])
    with torch.no_grad():
        out = model.forward_with_cfg(x, t, y, 1.5)
        cond, uncond = model(images, times, classes), model(images, times, y[BATCH:])
    torch.testing.assert_close(out[:BATCH, :3], (uncond + 1.5 * (cond - uncond))[:, :3])
    torch.testing.assert_close(out[BATCH:, :3], out[:BATCH, :3])
    torch.testing.assert_close(out[:BATCH, 3:], cond[:, 3:])
    assert out.shape == (2 * BATCH, 8, 10, 14)


def test_facebook_layout_drops_classes_in_training_only():
    embedder = DiT((4, 4)).y_embedder
    embedder.dropout_prob = 1.0
    classes = torch.arange(4)
    assert torch.equal(embedder(classes, False), embedder.embedding_table.weight[:4])
    assert torch.equal(embedder(classes, True), embedder.embedding_table.weight[[10] * 4])


def test_catalogue_does_not_know_the_library():
    folder = Path(architectures.__file__).parent
    for file in folder.glob("*.py"):
        assert not re.search(r"^\s*(from|import) adaptok", file.read_text(), re.MULTILINE), file
