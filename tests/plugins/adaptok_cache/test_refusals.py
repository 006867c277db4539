"""What is refused, what is computed as if there were no cache, and what is said."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from adaptok_cache import FirstBlockCache, IdleCacheWarning, TaylorSeer, TeaCache

import adaptok
from adaptok.errors import ConfigError, HandOverError, StackError
from adaptok.testing import make_vit

NAMES = ("teacache", "firstblock", "taylorseer")


def test_all_are_announced():
    assert set(NAMES) <= set(adaptok.available("stages"))
    assert {adaptok.describe(name).entries[0].origin for name in NAMES} == {"cache"}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"name": "teacache", "threshold": -0.1}, "threshold of 'teacache' is a number of at leas"),
        ({"name": "teacache", "threshold": float("nan")}, "at least 0, .*got nan"),
        ({"name": "teacache", "threshold": "low"}, "threshold: Input should be a valid number"),
        ({"name": "teacache", "coefficients": ()}, "coefficients of 'teacache' are finite number"),
        ({"name": "teacache", "coefficients": (float("nan"), 1.0)}, "highest power first"),
        ({"name": "teacache", "signal": "output"}, "signal: Input should be 'input' or 'condition"),
        ({"name": "teacache", "steps": 0}, "steps of 'teacache' is a whole number of at least 1"),
        ({"name": "teacache", "interval": 2}, "interval: this option does not exist"),
        ({"name": "firstblock", "threshold": -1}, "threshold of 'firstblock'"),
        ({"name": "firstblock", "warmup": 0}, "warmup of 'firstblock' is a whole number of at"),
        ({"name": "taylorseer", "interval": 0}, "interval of 'taylorseer' is a whole number"),
        ({"name": "taylorseer", "order": -1}, "order of 'taylorseer' is a whole number from 0 to"),
        ({"name": "taylorseer", "max_requests": 0}, "max_requests of 'taylorseer'"),
    ],
)
def test_options_out_of_range(dit, config, match):
    with pytest.raises(ConfigError, match=match):
        adaptok.wrap(dit, stack=[config])
    assert not adaptok.is_wrapped(dit)


def test_an_announcement_is_a_number():
    with pytest.raises(ConfigError, match="steps of 'teacache' is a whole number of at least 1"):
        TeaCache().announce("one", 0)


@pytest.mark.parametrize("pair", [("teacache", "firstblock"), ("taylorseer", "taylorseer")])
def test_two_caches(dit, pair):
    with pytest.raises(StackError, match=r"both reuse earlier steps. The nearest stack that can"):
        adaptok.wrap(dit, stack=pair)
    assert not adaptok.is_wrapped(dit)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_steps(name):
    vit = make_vit()
    keys = set(vit.state_dict())
    with pytest.raises((StackError, HandOverError), match=r"diffusion steps?.* transformers"):
        adaptok.wrap(vit, stack=[name])
    assert not adaptok.is_wrapped(vit)
    assert set(vit.state_dict()) == keys


def test_a_host_without_a_condition(wrapped, tools):
    model = wrapped(TeaCache(signal="condition"))
    read = model.blocks.backbone.read

    def read_without(*args):
        return replace(read(*args), condition=None)

    model.blocks.backbone.read = read_without
    with pytest.raises(HandOverError, match="hands none over: give signal='input'"):
        tools.run_steps(model, tools.Walk().steps[:1])


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_nobody_are_computed_and_it_is_said_once(wrapped, dit, tools, name):
    model, walk = wrapped(name), tools.Walk().steps
    stage = model.blocks.stages[0]
    outs = tools.run_steps(model, walk[:1], request=None)  # one call is no walk: nothing is said
    with pytest.warns(IdleCacheWarning, match=r"does not know whose steps") as seen:
        outs += tools.run_steps(model, walk[1:], request=None)
    assert len(seen) == 1
    with torch.no_grad():
        assert all(map(torch.equal, outs, [dit(*step) for step in walk]))
    assert stage.memory_bytes == 0
    assert (stage.computed, stage.reused) == (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tools.run_steps(model, walk, request=None)


@pytest.mark.parametrize("name", NAMES)
def test_training_computes_every_step(wrapped, dit, tools, name):
    model, walk = wrapped(name), tools.Walk().steps
    tools.run_steps(model, walk[:3])
    model.train()
    with adaptok.request(model, "one"):
        outs = [model(*step) for step in walk[3:]]
    expected = [dit(*step) for step in walk[3:]]
    assert all(map(torch.equal, outs, expected))
    sum(out.square().mean() for out in outs).backward()
    sum(out.square().mean() for out in expected).backward()
    for name, parameter in dit.named_parameters():
        found = model.get_parameter(name)
        if parameter.grad is not None:
            torch.testing.assert_close(found.grad, parameter.grad)
    assert model.blocks.stages[0].memory_bytes == 0


def test_a_recorded_gradient_computes_every_step_and_says_so(wrapped, tools):
    model, walk = wrapped(TeaCache(float("inf"))), tools.Walk().steps
    with (
        adaptok.request(model, "one"),
        pytest.warns(IdleCacheWarning, match=r"while gradients are recorded") as seen,
    ):
        outs = [model(*step) for step in walk]
    assert len(seen) == 1
    assert outs[-1].requires_grad
    assert model.blocks.stages[0].memory_bytes == 0


def test_what_a_wrapped_model_shows(wrapped, tools):
    model = wrapped(TaylorSeer(interval=3))
    tools.run_steps(model, tools.Walk().steps)
    shown = repr(model.blocks)
    assert "stage='taylorseer', interval=3, order=1, steps=12 computed, 15 reused" in shown


def test_a_config_makes_the_same_stage_again(dit, template):
    options = {"name": "teacache", "threshold": 0.3, "coefficients": (2.0, 0.5), "steps": 20}
    config = adaptok.wrap(dit, stack=[options]).blocks.config
    again = adaptok.WrapConfig.from_json(config.to_json())
    assert again.complete
    model = adaptok.wrap(copy.deepcopy(template), stack=again.stack)
    stage = model.blocks.stages[0]
    assert (stage.threshold, stage.coefficients, stage.steps) == (0.3, (2.0, 0.5), 20)


def test_first_block_refuses_an_infinite_negative():
    with pytest.raises(ConfigError, match="got -inf"):
        FirstBlockCache(float("-inf"))
