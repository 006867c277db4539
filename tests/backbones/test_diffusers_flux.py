"""Flux of diffusers: two lists, and a grid in position ids."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from backbones.diffusers_checks import (
    call,
    change_token_inputs,
    check_oracle,
    find,
    wrap_host,
)
from hypothesis import given
from hypothesis import strategies as st

import adaptok
from adaptok.backbones.diffusers_flux import DiffusersFlux, make_rows, read_grid
from adaptok.errors import HandOverError, HostOptionError, ProbeError, ShapeError


def make_ids(h, w, dtype=torch.float32, image=0, corner=(0, 0)):
    rows = make_rows((h, w), torch.zeros(1, dtype=dtype)) + torch.tensor(corner, dtype=dtype)
    return torch.cat([torch.full((h * w, 1), image, dtype=dtype), rows], dim=1)


def test_facts():
    host = DiffusersFlux.match(find("flux").build())
    assert (host.width, host.depth) == (48, 5)
    assert host.containers == ("transformer_blocks", "single_transformer_blocks")


def test_both_lists_run_on_kept_tokens():
    model, seen = wrap_host("flux"), []
    for block in model.transformer_blocks.all_blocks:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["hidden_states"].shape), with_kwargs=True
        )
    call("flux", model)
    assert seen == [(1, 18, 48)] * 15  # five blocks for three samples that keep different cells


def test_samples_that_keep_the_same_cells_run_together():
    model, seen = wrap_host("flux"), []
    first = model.transformer_blocks[0]
    first.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    case = find("flux")
    kwargs = dict(case.inputs(model).kwargs)
    kwargs["hidden_states"] = kwargs["hidden_states"][[0, 1, 0]]
    with torch.no_grad():
        model(**kwargs)
    assert sorted(seen) == [1, 2]


def test_first_single_block_stays_in_reach():
    model = find("flux").build()
    first = model.single_transformer_blocks[0]
    adaptok.wrap(model, "dc", budget=0.5, backbone=DiffusersFlux.match(model))
    assert model.single_transformer_blocks[0] is first
    assert list(model.single_transformer_blocks) == []


@pytest.mark.parametrize("span", [(0, 2), (2, 5), (1, 4)], ids=str)
def test_spans_over_both_lists(span):
    model = wrap_host("flux", span=span, budget=1.0)
    full = call("flux", model)
    with adaptok.budget(model, keep=0.3):
        assert not torch.equal(call("flux", model), full)
    assert torch.equal(call("flux", adaptok.unwrap(model)), full)


def test_twin_with_wrong_rotary_rows_is_caught():
    host = change_token_inputs(DiffusersFlux, lambda value: replace(value, start=0))
    model = wrap_host("flux", host)  # with every cell kept, all rows are there in any case
    with pytest.raises(AssertionError):
        check_oracle("flux", model, 0.5)


def test_twin_with_shifted_rotary_rows_is_caught():
    def shift(value):
        return replace(value, value=value.value.roll(1, 0))

    with pytest.raises(ProbeError, match="differs by"):
        wrap_host("flux", change_token_inputs(DiffusersFlux, shift))


def test_twin_that_takes_one_table_for_all_samples_is_caught():
    class Together(DiffusersFlux):
        positions_per_sample = True

    model = wrap_host("flux", Together)
    with pytest.raises(AssertionError):
        check_oracle("flux", model, 0.5)


def test_twin_that_forgets_the_text_is_caught():
    class Stale(DiffusersFlux):
        def run_block(self, block, call):
            return replace(super().run_block(block, call), streams=call.streams)

    with pytest.raises(ProbeError, match="differs by"):
        wrap_host("flux", Stale)


@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.long]),
    corner=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_grids_are_read_off_ids(h, w, dtype, corner):
    assert read_grid(make_ids(h, w, dtype, corner=corner)) == (h, w)


@given(h=st.integers(2, 6), w=st.integers(2, 6), seed=st.integers(0, 99))
def test_ids_in_another_order_are_refused(h, w, seed):
    ids = make_ids(h, w)
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(seed))
    if torch.equal(order, torch.arange(h * w)):
        order = order.flip(0)
    with pytest.raises(HostOptionError, match="not the rows and columns of one grid"):
        read_grid(ids[order])


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(35, 3),
        torch.full((35, 3), float("nan")),
        make_ids(5, 7) * 2,
        make_ids(300, 2, torch.float64).bfloat16(),
    ],
    ids=["zero", "nan", "spread", "rounded"],
)
def test_ids_that_are_no_grid_are_refused(ids):
    ids[:, 0] = 0
    with pytest.raises(HostOptionError, match="not the rows and columns of one grid"):
        read_grid(ids)


def test_a_second_image_is_refused():
    ids = torch.cat([make_ids(3, 7), make_ids(2, 7, image=1)])
    with pytest.raises(HostOptionError, match="several images into one sequence, as Flux Kontext"):
        call("flux", wrap_host("flux"), img_ids=ids)


def test_missing_and_misshapen_ids_are_refused():
    model = wrap_host("flux")
    with pytest.raises(HandOverError, match="the grid of Flux is in img_ids only"):
        call("flux", model, img_ids=None)
    with pytest.raises(ShapeError, match=r"img_ids are \(35, 3\)"):
        call("flux", model, img_ids=make_ids(5, 6))


def test_ids_with_a_batch_axis_are_read():
    model = wrap_host("flux")
    expected = call("flux", model)
    assert torch.equal(call("flux", model, img_ids=make_ids(5, 7).expand(3, -1, -1)), expected)


def test_a_changed_grid_is_seen():
    """The reading is kept for one tensor as it is, not for its address or its shape."""
    model = wrap_host("flux")
    ids = make_ids(5, 7)

    def grids():
        with adaptok.trace(model) as trace:
            call("flux", model, img_ids=ids)
        return trace.steps[0].grid

    assert grids() == (5, 7)
    assert grids() == (5, 7)
    ids.copy_(make_ids(7, 5))
    assert grids() == (7, 5)
    with torch.inference_mode():
        ids = make_ids(5, 7)
        assert grids() == (5, 7)
        ids.copy_(make_ids(7, 5))
        assert grids() == (7, 5)


def test_copies_read_their_own_ids():
    model = wrap_host("flux")
    call("flux", model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.transformer_blocks.backbone.reading is None
        assert torch.equal(call("flux", other), call("flux", model))


def test_a_graph_refuses_ids_of_another_grid():
    torch._dynamo.reset()
    model = wrap_host("flux")
    expected = call("flux", model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(call("flux", compiled), expected, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="img_ids of another grid"):
        call("flux", compiled, img_ids=make_ids(7, 5))
    torch._dynamo.reset()


def test_export():
    model = wrap_host("flux")
    inputs = find("flux").inputs(model)
    with pytest.raises(HandOverError, match="call the model once on these ids before"):
        torch.export.export(model, (), inputs.kwargs, strict=False)
    expected = call("flux", model)
    program = torch.export.export(model, (), inputs.kwargs, strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(program(**inputs.kwargs).sample, expected, rtol=0, atol=1e-5)
        with pytest.raises(RuntimeError, match="img_ids of another grid"):
            program(**(inputs.kwargs | {"img_ids": make_ids(7, 5)}))


@pytest.mark.parametrize("option", ["controlnet_block_samples", "controlnet_single_block_samples"])
def test_controlnets_are_refused(option):
    with pytest.raises(HostOptionError, match=f"{option} reaches into single blocks"):
        call("flux", wrap_host("flux"), **{option: [torch.zeros(3, 35, 48)]})


@pytest.mark.parametrize("key", ["ip_adapter_image_embeds", "attention_mask"])
def test_tensors_for_attention_are_refused(key):
    with pytest.raises(HostOptionError, match=f"joint_attention_kwargs=.'{key}'"):
        call("flux", wrap_host("flux"), joint_attention_kwargs={key: [torch.zeros(3, 1, 4)]})
