import pytest
import torch
from conftest import randomise

from adaptok.dc.baseline import DiT
from adaptok.dc.config import DCDiTConfig, DiTConfig
from adaptok.dc.folder import ModelCard, load_model, save_model
from adaptok.errors import CheckpointError, ConfigError
from adaptok.train.batches import Share, check_share, draw_batch, open_training_set
from adaptok.train.checkpoint import list_checkpoints, load_checkpoint
from adaptok.train.config import drop_at, fit_model_to_data
from adaptok.train.distillation import (
    Teacher,
    measure_distillation,
    plan_upcycling,
    share_of_variance,
    start_from_host,
)
from adaptok.train.trainer import train

CPU = torch.device("cpu")
MODEL = DiTConfig(hidden_size=64, depth=2, num_heads=4, patch_size=2)


@pytest.fixture(scope="module")
def host_folder(make_config, tmp_path_factory):
    """A DiT whose every weight matters, of the size of the tiny set."""
    config = make_config(model=MODEL)
    dit = randomise(DiT(config.model), scale=0.2)
    folder = tmp_path_factory.mktemp("host") / "model"
    save_model(dit, ModelCard(), folder)
    return folder


@pytest.fixture
def upcycling(make_config, host_folder):
    """A run that distils for four steps and fine-tunes for two."""

    def make(**options):
        config = make_config(model=MODEL, **({"steps": 6, "budget_warmup": 0} | options))
        return plan_upcycling(config, host_folder, distill_steps=4)

    return make


def draw(config, step=0):
    return draw_batch(config, open_training_set(config), step, Share())


def block_weights(model):
    return {
        name: value.clone() for name, value in model.state_dict().items() if "backbone.b" in name
    }


def test_the_teacher_says_what_it_computes(host_folder):
    dit = load_model(host_folder).model
    teacher = Teacher.read(dit)
    x, t, y = torch.randn(2, 12, 8, 8), torch.tensor([3.0, 800.0]), torch.tensor([0, 3])
    answer = teacher.answer(x, t, y)
    assert answer.patches.shape == (2, 64, 4, 4)
    assert answer.tokens.shape == (2, 16, 64)
    with torch.no_grad():
        assert torch.equal(answer.output, dit(x, t, y))
        assert torch.equal(answer.patches, dit.x_embedder(x))
        # the tokens are those that the final layer makes the output of
        last = dit.final_layer(answer.tokens, dit.t_embedder(t) + dit.y_embedder(y))
    assert torch.equal(last[0, 5, :24], answer.output[0, :, 2, 2])  # patch (1, 1), its first cell
    assert not dit.blocks[-1]._forward_hooks
    assert not dit.x_embedder._forward_hooks


def test_gradients_reach_the_new_parts_alone(upcycling):
    config = upcycling()
    model, teacher = start_from_host(config, CPU)
    randomise(model.final_layer)
    measures = measure_distillation(model, teacher, config, draw(config))
    measures["loss"].backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    new = {"embed", "encoder", "router", "dechunker", "decoder", "final_layer", "condition_norm"}
    assert reached == new | {"backbone"}
    assert all(p.grad is None for p in model.backbone.blocks.parameters())
    assert model.backbone.norm.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.host.model.parameters())


def test_the_encoder_learns_from_patches_and_the_decoder_from_the_output(upcycling):
    config = upcycling()
    model, teacher = start_from_host(config, CPU)
    randomise(model.final_layer)
    measures = measure_distillation(model, teacher, config, draw(config))
    measures["patches"].backward(retain_graph=True)
    assert model.decoder.blocks[0].conv1.weight.grad is None
    assert model.encoder.blocks[0].conv1.weight.grad.abs().sum() > 0
    model.zero_grad()
    measures["output"].backward()
    assert model.encoder.blocks[0].conv1.weight.grad is None
    assert model.decoder.blocks[0].conv1.weight.grad.abs().sum() > 0


def test_cells_are_compared_with_their_own_patch(upcycling):
    config = upcycling()
    model, teacher = start_from_host(config, CPU)
    batch = draw(config)

    def encode_as_teacher(x, condition):
        patches = teacher.host.model.x_embedder(x)
        return patches.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)

    model.encode = encode_as_teacher
    assert measure_distillation(model, teacher, config, batch)["patches"] < 1e-10
    model.encode = lambda x, condition: encode_as_teacher(x, condition).flip(1)
    assert measure_distillation(model, teacher, config, batch)["patches"] > 0.1


def test_distilling_lowers_the_loss(upcycling):
    config = upcycling(learning_rate=2e-3)
    model, teacher = start_from_host(config, CPU)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    blocks, losses = block_weights(model), []
    batch = draw(config)
    for _ in range(25):
        measures = measure_distillation(model, teacher, config, batch)
        optimizer.zero_grad()
        measures["loss"].backward()
        optimizer.step()
        losses.append({name: value.item() for name, value in measures.items()})
    assert losses[-1]["patches"] < 0.7 * losses[0]["patches"]
    assert losses[-1]["output"] < 0.9 * losses[0]["output"]
    after = block_weights(model)
    assert all(torch.equal(value, after[name]) for name, value in blocks.items())


def test_a_run_distils_first_and_trains_the_whole_after(upcycling, host_folder, tmp_path):
    config = upcycling(log_every=3, checkpoint_every=4, keep_checkpoints=9)
    reports = []
    train(config, tmp_path / "run", on_step=reports.append)
    assert [report.step for report in reports] == [3, 4, 6]  # a report where the loss changes
    assert {"patches", "output"} <= reports[0].parts.keys()
    assert {"patches", "output"} & reports[2].parts.keys() == set()
    assert reports[0].drop == 0.0
    host = load_model(host_folder).model
    folders = list_checkpoints(tmp_path / "run")
    distilled, last = (load_checkpoint(folder) for folder in folders)
    name = "backbone.blocks.0.mlp.fc1.weight"
    assert torch.equal(distilled.model[name], host.blocks[0].mlp.fc1.weight)
    assert not torch.equal(last.model[name], host.blocks[0].mlp.fc1.weight)
    for mine, theirs in (("label_embedder.table", "y_embedder.table"),):
        assert torch.equal(
            last.model[f"{mine}.weight"], host.get_submodule(theirs).weight
        )  # frozen, bit for bit
    assert load_model(tmp_path / "run" / "model").model.config == config.model


@pytest.mark.parametrize("cut", [2, 5])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(upcycling, tmp_path, cut):
    config = upcycling(checkpoint_every=1)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "cut", stop_after=cut)
    train(config, tmp_path / "cut")
    whole, cut_one = (load_model(tmp_path / name / "model").model for name in ("whole", "cut"))
    for one, other in zip(whole.parameters(), cut_one.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_first_weights_follow_from_the_seed_and_the_host(upcycling, host_folder):
    one, other = (start_seeded(upcycling(seed=seed)) for seed in (0, 1))
    again = start_seeded(upcycling(seed=0))
    assert torch.equal(one.embed.weight, again.embed.weight)
    assert not torch.equal(one.embed.weight, other.embed.weight)
    host = load_model(host_folder).model
    assert torch.equal(other.backbone.blocks[1].attn.qkv.weight, host.blocks[1].attn.qkv.weight)


def start_seeded(config):
    from adaptok.train.learner import make_model

    return make_model(config, CPU)[0]


def test_nothing_is_dropped_while_distilling(upcycling):
    config = upcycling(steps=50, drops=(0.5,))
    assert [drop_at(config, step) for step in (0, 3, 4)] == [0.0, 0.0, 0.5]


def test_share_of_variance():
    target = torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    assert share_of_variance(target, target) == 0
    assert share_of_variance(target.mean().expand(2, 2), target) == pytest.approx(1.0)


def test_refusals(make_config, host_folder, upcycling, tmp_path):
    config = make_config(model=MODEL)
    with pytest.raises(ConfigError, match="upcycling has no option depth"):
        plan_upcycling(config, host_folder, 4, depth=3)
    with pytest.raises(CheckpointError, match="there is no model folder"):
        plan_upcycling(config, tmp_path / "nothing", 4)
    with pytest.raises(ConfigError, match="distill_steps needs host"):
        make_config(distill_steps=3)
    with pytest.raises(ConfigError, match="host gives its blocks to a DCDiT"):
        make_config(model=MODEL, host=str(host_folder))
    other = make_config(
        model=DCDiTConfig(hidden_size=64, depth=3, num_heads=4), host=str(host_folder)
    )
    with pytest.raises(ConfigError, match=r"has 3 blocks of width 64 .* has 2 of width 64"):
        train(fit_model_to_data(other, 3), tmp_path / "run")
    with pytest.raises(ConfigError, match="distil in one process"):
        check_share(upcycling(), 2)
