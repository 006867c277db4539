import os
import resource
from dataclasses import replace

import pytest
import torch

from adaptok.errors import CheckpointError, StorageError
from adaptok.storage import save_tensors
from adaptok.train.batches import Share, draw_batch, open_training_set
from adaptok.train.checkpoint import (
    Checkpoint,
    RunState,
    check_tensors,
    list_checkpoints,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from adaptok.train.learner import Learner

CPU = torch.device("cpu")
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def learner(make_config):
    config = make_config()
    learner = Learner.start(config, CPU)
    for step in range(3):
        learner.take_step(draw_batch(config, open_training_set(config), step, Share()), step)
    return learner


def snapshot(learner, step=3):
    state = RunState(
        step=step,
        seconds=1.5,
        config=learner.config.model_dump(mode="json"),
        window=learner.window.read(lambda x: x),
        window_steps=learner.window.steps,
    )
    return Checkpoint(state, learner.model.state_dict(), learner.ema, learner.moments())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoint_holds_everything_bit_for_bit(learner, tmp_path):
    saved = snapshot(learner)
    folder = save_checkpoint(tmp_path, saved, keep=2)
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    found = load_checkpoint(folder)
    assert found.state == saved.state
    assert equal(found.model, saved.model)
    assert equal(found.ema, saved.ema)
    assert equal(found.optimizer, saved.optimizer)
    assert not equal(found.model, found.ema)
    assert any(value.abs().max() > 0 for value in found.optimizer.values())


def test_restored_learner_takes_the_same_step(learner, make_config, tmp_path):
    config, images = make_config(), open_training_set(make_config())
    folder = save_checkpoint(tmp_path, snapshot(learner), keep=1)
    pair = [Learner.start(config, CPU) for _ in range(2)]
    for other in pair:
        other.restore(load_checkpoint(folder))
        other.take_step(draw_batch(config, images, 3, Share()), 3)
    assert equal(pair[0].moments(), pair[1].moments())
    assert equal(pair[0].ema, pair[1].ema)
    assert not equal(pair[0].ema, learner.ema)
    assert pair[0].moments()["step.embed.weight"] == 4
    assert pair[0].window.steps == 4


def test_only_the_newest_stay(learner, tmp_path):
    for step in (9, 10, 11, 100):
        save_checkpoint(tmp_path, snapshot(learner, step), keep=2)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000011", "step-00000100"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_leftovers_are_removed_and_nothing_else(learner, tmp_path):
    save_checkpoint(tmp_path, snapshot(learner), keep=1)
    place = tmp_path / "checkpoints"
    for path in (place / ".step-00000004.unfinished-77", place / ".step-00000001.outdated",
                 tmp_path / ".model.unfinished-77"):  # fmt: skip
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".log.jsonl.unfinished-77").write_text("{")
    (tmp_path / "mine.txt").write_text("keep")
    remove_leftovers(tmp_path)
    assert [path.name for path in place.iterdir()] == ["step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "mine.txt"]
    assert list_checkpoints(tmp_path / "nothing") == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "missing", "foreign"])
def test_damaged_checkpoint_is_named_with_the_way_out(learner, tmp_path, name, damage):
    folder = save_checkpoint(tmp_path, snapshot(learner), keep=1)
    path = folder / name
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "missing":
        path.unlink()
    elif name.endswith("json"):
        path.write_text('{"step": 3, "epoch": 1}')
    else:
        torch.save({"weight": torch.ones(2)}, path)  # a pickle
    with pytest.raises(CheckpointError, match=rf"{name}.*Delete this folder to go on from the"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", FILES[:3])
def test_tensors_of_another_model_are_refused_by_file(learner, tmp_path, name):
    folder = save_checkpoint(tmp_path, snapshot(learner), keep=1)
    model = learner.model.state_dict()
    check_tensors(load_checkpoint(folder), model, learner.names)
    save_tensors(folder / name, {"weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=rf"{name} does not fit .*missing.*Delete this"):
        check_tensors(load_checkpoint(folder), model, learner.names)


def test_moments_of_another_shape_are_refused(learner, tmp_path):
    saved = snapshot(learner)
    moments = dict(saved.optimizer) | {"exp_avg.embed.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"exp_avg.embed.weight has the shape \(2,\)"):
        check_tensors(replace(saved, optimizer=moments), saved.model, learner.names)


def test_full_disk_leaves_the_checkpoint_before(learner, tmp_path):
    first = save_checkpoint(tmp_path, snapshot(learner, 3), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError, match=r"step-00000004.*Free some space"):
            save_checkpoint(tmp_path, snapshot(learner, 4), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [first.name]
    assert load_checkpoint(first).state.step == 3
