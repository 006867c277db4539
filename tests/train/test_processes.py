"""Two processes learn what one learns; they start alike, or say what differs.

Processes are real ones, connected by gloo.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gloo_processes import Group, note_refusals
from gradients_of_ranks import STEP, random_weights, save_one_step, take_one_step

from adaptok.dc.config import DCDiTConfig, DiTConfig
from adaptok.dc.folder import build_model
from adaptok.errors import ConfigError
from adaptok.storage import load_tensors
from adaptok.train.batches import Share, draw_batch, make_latents, open_training_set
from adaptok.train.processes import (
    REFUSED,
    Processes,
    check_processes,
    fingerprint_checkpoint,
    fingerprint_data,
    start_accelerator,
)
from adaptok.train.trainer import train


@pytest.fixture(scope="module")
def make_step(make_config):
    """A run whose gradients are clipped and whose budget cuts."""

    def make(**options):
        return make_config(**{"gradient_clip": 0.05, "budget_warmup": 0, "drops": (0.3,)} | options)

    return make


CASES = ("plain", "accumulated", "sharded", "sharded-kept", "sharded-recomputed", "sharded-dit")


@pytest.fixture(scope="module")
def steps_of_two(make_step, tmp_path_factory):
    """What two processes make of one step in each of several ways, and how one was asked."""
    folder = tmp_path_factory.mktemp("steps")
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2}
    asked = {
        "plain": make_step(),
        "accumulated": make_step(accumulation=2),
        "sharded": make_step(),
        "sharded-kept": make_step(accumulation=2),
        "sharded-recomputed": make_step(model=DCDiTConfig(**sizes, gradient_checkpointing=True)),
        "sharded-dit": make_step(model=DiTConfig(**sizes)),
    }
    for name, config in asked.items():
        config.to_json_file(folder / f"{name}.json")
    with Group(save_one_step, folder) as group:
        group.finish()
    return {
        name: (config.model_copy(update={"accumulation": 1}),
               load_tensors(folder / f"{name}.safetensors"))
        for name, config in asked.items()
    }  # fmt: skip


def test_the_batch_is_one_that_tells_processes_apart(make_step):
    config = make_step()
    model = build_model(config.model)
    model.load_state_dict(random_weights(config))
    batch = draw_batch(config, open_training_set(config), STEP, Share())
    objective = config.make_objective()
    t = objective.times(batch.u)
    x = objective.noisy(make_latents(batch.images, 2), batch.noise, t)
    _, routing = model(x, objective.model_time(t), batch.labels, drop=0.3, return_routing=True)
    assert routing.kept.max() > 2 * routing.kept.min()
    first, second = routing.kept.chunk(2)
    assert abs(first.sum() - second.sum()) > 2


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_two_processes_are_those_of_one(steps_of_two, case):
    config, two = steps_of_two[case]
    one = take_one_step(config, Share())
    assert one.keys() == two.keys()
    assert one["norm"] > 2 * config.gradient_clip
    for kind, tolerance in {"before": 1e-5, "behind": 1e-5, "norm": 1e-5,
                            "weights": 1e-4, "averages": 1e-4}.items():  # fmt: skip
        names = [name for name in one if name.split(".")[0] == kind]
        largest = max(one[name].abs().max() for name in names)
        apart = max((one[name] - two[name]).abs().max() for name in names)
        assert apart <= tolerance * largest, kind
    assert all(one[name].abs().max() > 0 for name in one if name.startswith("before"))
    assert one["share"] == 1
    assert two["share"] == 1 if "sharded" not in case else two["share"] < 0.7


def test_gradients_differ_where_groups_would_be_cut(make_step):
    """What the check of groups is for: groups of one half of the batch are other groups."""
    config = make_step(ratio_group=8, ratio_weight=1.0)
    whole = take_one_step(config, Share())
    halves = [take_one_step(config, Share(rank, 2)) for rank in range(2)]
    name = "before.router.project.weight"
    apart = (halves[0][name] + halves[1][name]) / 2 - whole[name]
    assert apart.abs().max() > 1e-3 * whole[name].abs().max()


@pytest.mark.parametrize(
    ("ranks", "options", "match"),
    [
        (9, {}, r"9 processes and batch_size=8: .*start at most 8 processes or raise batch_size"),
        (3, {}, "no multiple of 3 processes times accumulation=1"),
        (2, {"ratio_group": 8}, r"ratio_group=8, .*2 processes sees 4 samples .*1, 2, 4 fits"),
        (2, {"ratio_group": 16}, r"ratio_group=16, .*ratio_group 1, 2, 4 fits"),
        (2, {"ratio_group": 3, "batch_size": 12}, r"1, 2, 3, 6 fits|"),
        (1, {"ratio_group": 4, "accumulation": 4}, r"1, 2 fits, .*a multiple of 16"),
        (4, {"ratio_group": 4, "batch_size": 24}, r"1, 2, 3, 6 fits, .*a multiple of 16"),
    ],
)  # fmt: skip
def test_uneven_numbers_of_processes_are_refused(make_config, ranks, options, match):
    config = make_config(**options)
    if match.endswith("|"):
        check_processes(config, ranks)
        return
    with pytest.raises(ConfigError, match=match):
        check_processes(config, ranks)


def test_groups_matter_to_routers_only_and_fit_alone(make_config):
    check_processes(make_config(ratio_group=16), 1)  # a smaller batch is one group
    check_processes(make_config(ratio_group=3), 1)
    model = DiTConfig(hidden_size=32, depth=1, num_heads=2)
    check_processes(make_config(model=model, ratio_group=16), 8)


def test_fingerprints_tell_data_apart(make_config, tmp_path):
    config = make_config()
    images = open_training_set(config)
    mine = fingerprint_data(config, images)
    assert mine == fingerprint_data(config, open_training_set(config))
    with np.load(config.data) as arrays:
        pixels, labels = arrays["images"].copy(), arrays["labels"].copy()
    other = make_config(data=str(tmp_path / "other.npz"))
    labels[[0, 1]] = labels[[1, 0]]
    np.savez(tmp_path / "other.npz", images=pixels, labels=labels)
    assert fingerprint_data(other, open_training_set(other)) != mine
    assert fingerprint_data(make_config(seed=1), images) != mine
    assert fingerprint_checkpoint(None) != fingerprint_checkpoint(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    assert fingerprint_checkpoint(tmp_path) != fingerprint_checkpoint(tmp_path / "other")


def test_processes_that_start_differently_are_refused_by_name(make_config, tmp_path):
    config = make_config(steps=2)
    with np.load(config.data) as arrays:
        np.savez(tmp_path / "other.npz", images=255 - arrays["images"], labels=arrays["labels"])
    (tmp_path / "begun").mkdir()
    train(config, tmp_path / "begun", stop_after=1)
    before = sorted(path.name for path in (tmp_path / "begun").rglob("*"))
    run, begun = str(tmp_path / "run"), str(tmp_path / "begun")
    cases = {
        "options": [(config, run), (make_config(steps=2, learning_rate=1e-4), run)],
        "images": [(config, run), (make_config(steps=2, data=str(tmp_path / "other.npz")), run)],
        "folder": [(config, begun), (config, run)],
        "groups": [(make_config(ratio_group=8), run)] * 2,
    }
    (tmp_path / "notes").mkdir()
    with Group(note_refusals, tmp_path / "notes", cases) as group:
        group.finish()
    notes = {path.name: path.read_text() for path in (tmp_path / "notes").iterdir()}
    expected = {
        "options": "process 1 differs from process 0 in its options: start all with the same",
        "images": "process 1 differs from process 0 in its options and data: ",
        "folder": "process 1 differs from process 0 in its checkpoint: give all the same output",
        "groups": "ratio_group=8",
    }
    for name, text in expected.items():
        for rank in range(2):
            assert text in notes[f"{name}-{rank}"]
    assert not (tmp_path / "run").exists()
    assert before == sorted(path.name for path in (tmp_path / "begun").rglob("*"))


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes, and they do not see .*ACCELERATE_USE_CPU"):
        start_accelerator()


@pytest.mark.parametrize("kind", REFUSED)
def test_other_ways_to_share_a_model_are_refused(monkeypatch, kind):
    import accelerate

    found = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), num_processes=2)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **options: found)
    with pytest.raises(ConfigError, match=f"asks for {kind}, .*data-parallel or with FSDP 2"):
        start_accelerator()


def test_one_process_needs_no_one_else(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    alone = Processes.start()
    assert (alone.share, alone.is_first, alone.group, alone.sharding) == (Share(), True, None, None)
    assert alone.agree(True)
    assert not alone.agree(False)
    alone.compare({"options": json.dumps(1)})
    assert torch.equal(alone.average(torch.ones(2)), torch.ones(2))
