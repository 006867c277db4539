"""The noise of a step is read off the family's own scale, unless the user gives one."""

import pytest
import torch

import adaptok
from adaptok.errors import ConfigError, HandOverError
from benchmarks.architectures import find_case


def test_the_scale_of_the_family_is_used():
    case = find_case("diffusers/dit")
    model = case.build()
    inputs = case.inputs(model)
    schedule = {"name": "schedule", "schedule": ((0.0, 1.0), (0.5, 0.5))}
    adaptok.wrap(model, stack=[schedule])
    with torch.no_grad(), adaptok.trace(model) as seen:
        found = case.run(model, inputs)
    adaptok.unwrap(model)
    adaptok.wrap(model, stack=[{**schedule, "scale": (999.0, 0.0)}])
    with torch.no_grad(), adaptok.trace(model) as given:
        expected = case.run(model, inputs)
    assert torch.equal(found, expected)
    assert seen.steps[0].depths.tolist() == given.steps[0].depths.tolist()
    assert len(set(seen.steps[0].depths.tolist())) > 1


def test_a_host_without_a_scale_of_its_own_needs_one():
    case = find_case("facebook/dit")
    model = case.build()
    adaptok.wrap(model, stack=["schedule"], verify=False)
    with pytest.raises(HandOverError, match="scale"):
        case.run(model, case.inputs(model))


def test_facts_of_the_host_are_no_options_of_parts_that_do_not_take_them():
    model = find_case("timm/deit3_small_patch16_224").build()
    with pytest.raises(ConfigError, match="depth"):
        adaptok.wrap(model, stack=[{"name": "exit", "depth": 3}])
