"""Weights in parts: read from the launcher, cut, gathered, averaged, saved.

Here one process holds the only part, which is quick; tests/train/test_processes.py and
test_resume.py share a model between two.
"""

import pytest
import torch
from gradients_of_ranks import STEP, random_weights, take_one_step

from adaptok.dc.config import DCDiTConfig
from adaptok.errors import ConfigError
from adaptok.train.batches import Share, draw_batch, open_training_set
from adaptok.train.checkpoint import Checkpoint, RunState, load_checkpoint, save_checkpoint
from adaptok.train.learner import Learner, compile_parts
from adaptok.train.sharding import (
    Sharding,
    gather_state,
    is_sharded,
    local_part,
    read_sharding,
    shard_like,
    shard_model,
)

CPU = torch.device("cpu")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def world():
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_launcher_says_whether_and_how():
    assert read_sharding({}) is None
    assert read_sharding({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}) is None
    assert read_sharding(FSDP) == Sharding(reshard=True)
    assert read_sharding(FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "False"}) == Sharding(reshard=False)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"FSDP_VERSION": "1"}, "asks for FSDP 1, .*start with --fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "leave --fsdp_offload_params out"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "True"}, "set gradient_checkpointing of the model"),
    ],
)
def test_what_the_launcher_may_not_ask_is_refused(more, match):
    with pytest.raises(ConfigError, match=match):
        read_sharding(FSDP | more)
    without_version = {"ACCELERATE_USE_FSDP": "1"}
    with pytest.raises(ConfigError, match="asks for FSDP 1"):
        read_sharding(without_version)


def test_blocks_are_the_parts_and_names_stay(world, make_config):
    plain = Learner.start(make_config(), CPU)
    learner = Learner.start(make_config(), CPU, Sharding())
    model = learner.model
    assert list(model.state_dict()) == list(plain.model.state_dict())
    cut = [name for name, module in model.named_modules() if type(module).__name__[:4] == "FSDP"]
    assert cut == [
        "",
        *(f"encoder.blocks.{i}" for i in range(2)),
        *(f"backbone.blocks.{i}" for i in range(2)),
        *(f"decoder.blocks.{i}" for i in range(2)),
    ]
    for name, value in model.state_dict().items():
        assert is_sharded(value), name
        assert value.dtype == torch.float32, name
        assert torch.equal(local_part(value), plain.ema[name])
        assert torch.equal(local_part(shard_like(plain.ema[name], value)), plain.ema[name])
    assert not any(is_sharded(value) for value in plain.ema.values())
    assert shard_like(plain.ema["embed.weight"], plain.ema["embed.bias"]).ndim == 4
    assert gather_state(learner.ema, keep=False) == {}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_sharded_step_is_a_step(world, make_config, precision):
    config = make_config(budget_warmup=0, drops=(0.3,), gradient_clip=0.05, precision=precision)
    whole, sharded = (take_one_step(config, Share(), how) for how in (None, Sharding()))
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, atol=1e-6, rtol=1e-6)
        assert sharded[name].dtype == torch.float32


def test_scaled_gradients_that_overflow_leave_the_weights(world, make_config):
    learner = Learner.start(make_config(precision="fp16"), CPU, Sharding())
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = gather_state(learner.model.state_dict(), keep=True)
    before = {name: value.clone() for name, value in before.items()}
    learner.take_step(draw_batch(learner.config, open_training_set(learner.config), 0, Share()), 0)
    after = gather_state(learner.model.state_dict(), keep=True)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert learner.scaler.get_scale() == 2.0**119


def save(learner, folder, step):
    state = RunState(step=step, seconds=1.0, config=learner.config.model_dump(mode="json"))
    parts = (learner.model.state_dict(), learner.ema, learner.moments())
    whole = (gather_state(part, keep=True) for part in parts)
    return save_checkpoint(folder, Checkpoint(state, *whole), keep=2)


def test_checkpoints_go_from_parts_to_wholes_and_back(world, make_config, tmp_path):
    config, images = make_config(budget_warmup=0), open_training_set(make_config())
    learner = Learner.start(config, CPU, Sharding())
    weights = random_weights(config)
    learner.model.load_state_dict(
        {name: shard_like(weights[name], own) for name, own in learner.ema.items()}
    )
    for step in range(2):
        learner.take_step(draw_batch(config, images, step, Share()), step)
    folder = save(learner, tmp_path, 2)
    found = []
    for sharding in (None, Sharding(), Sharding(reshard=False)):
        other = Learner.start(config, CPU, sharding)
        other.restore(load_checkpoint(folder))
        other.take_step(draw_batch(config, images, 2, Share()), 2)
        found.append(load_checkpoint(save(other, tmp_path / str(sharding), 3)))
    for part in ("model", "ema", "optimizer"):
        whole = getattr(found[0], part)
        for other in found[1:]:
            assert whole.keys() == getattr(other, part).keys()
            for name, value in whole.items():
                torch.testing.assert_close(
                    getattr(other, part)[name], value, atol=1e-6, rtol=1e-5, msg=name
                )
        # a step was taken, from the state that was saved
        saved = getattr(load_checkpoint(folder), part)
        assert any(not torch.equal(whole[name], saved[name]) for name in whole)
    assert found[1].optimizer["step.embed.weight"] == 3


# torch hides this warning of its own only from filters that are not errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.slow
def test_compiled_blocks_can_be_sharded(world, make_config):
    torch.compiler.reset()
    model = DCDiTConfig(hidden_size=32, depth=1, num_heads=2, encoder_blocks=1, decoder_blocks=1)
    config = make_config(model=model, budget_warmup=0, drops=(0.3,))
    batch = draw_batch(config, open_training_set(config), STEP, Share())
    weights, found = random_weights(config), []
    for compiled in (False, True):
        learner = Learner.start(config, CPU)
        learner.model.load_state_dict(weights)
        names = list(learner.model.state_dict())
        if compiled:
            compile_parts(learner.model, backend="eager", sharded=True)
            shard_model(learner.model, CPU, Sharding())
        assert list(learner.model.state_dict()) == names
        learner.collect_gradients(batch, STEP)
        gradients = {n: p.grad for n, p in learner.model.named_parameters() if p.requires_grad}
        found.append(gather_state(gradients, keep=True))
    largest = max(value.abs().max() for value in found[0].values())
    for name, value in found[0].items():
        assert (found[1][name] - value).abs().max() < 1e-5 * largest, name
