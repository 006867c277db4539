"""Many samples into one file: the same bytes, however often and by how many they are drawn."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from adaptok import DCDiT, DCDiTConfig
from adaptok.dc import DiT, DiTConfig
from adaptok.dc.folder import ModelCard, TrainedModel
from adaptok.diffusion import FlowObjective, HybridObjective, sample
from adaptok.errors import BudgetError, CheckpointError, ConfigError, StorageError
from adaptok.measure import measure_sampling
from adaptok.train import sample_store
from adaptok.train.batches import Share
from adaptok.train.decoding import make_decoder
from adaptok.train.pixels import depth_to_space, to_uint8
from adaptok.train.sample_plan import SamplePlan
from adaptok.train.sample_store import SampleStore
from adaptok.train.sampling_run import Painter, draw_to_file, hash_model

GRID = (4, 6)
CARD = ModelCard(objective="flow", image_size=8, space_to_depth=2)
COUNT = 11


def make_model(kind=DCDiT, **options):
    torch.manual_seed(0)
    plain = {"hidden_size": 64, "depth": 1, "num_heads": 2, "in_channels": 12, "num_classes": 3}
    config = {DCDiT: DCDiTConfig, DiT: DiTConfig}[kind](
        **plain, latent_size=GRID, **{"learn_sigma": False, **options}
    )
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    if kind is DCDiT:
        with torch.no_grad():  # as many cells kept as dropped, and not the same in each image
            model.router.score[3].weight.mul_(5)
            x = torch.randn(8, 12, *GRID)
            y = torch.arange(8) % 3
            _, routing = model(x, torch.full((8,), 500.0), y, return_routing=True)
            model.router.logit_bias.data -= routing.keep_prob[:, 1:-1].logit().median()
    return model


@pytest.fixture(scope="module")
def trained():
    return TrainedModel(make_model(), CARD)


def make_painter(trained, objective=None, **options):
    objective = objective or FlowObjective()
    values = {
        "model": "m",
        "weights": hash_model(trained, objective),
        "count": COUNT,
        "seed": 5,
        "labels": (0, 2),
        "scheduler": "flow-euler",
        "steps": 2,
        "height": 8,
        "width": 12,
    }
    plan = SamplePlan(**(values | options))
    return Painter(trained.model, plan, objective, make_decoder(trained))


def draw(trained, path, batch=3, **options):
    painter = make_painter(trained, **options)
    return draw_to_file(painter, SampleStore(path, painter.plan), batch=batch)


def draw_together(trained, path, ranks, batch=3):
    """Draw in threads that know no more of each other than processes do."""
    barrier = threading.Barrier(ranks, timeout=60)

    def work(rank):
        painter = make_painter(copy.deepcopy(trained))
        store = SampleStore(path, painter.plan)
        return draw_to_file(
            painter, store, batch=batch, share=Share(rank, ranks), meet=barrier.wait
        )

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, range(ranks)))


def stop_after(monkeypatch, parts):
    """Make the run fail while it writes one more part."""
    saved, left = sample_store.save_tensors, [parts]

    def save(path, tensors, metadata=None):
        if not left[0]:
            path.write_bytes(b"half a part")
            raise KeyboardInterrupt
        left[0] -= 1
        saved(path, tensors, metadata)

    monkeypatch.setattr(sample_store, "save_tensors", save)


@pytest.fixture
def broken(trained, tmp_path, monkeypatch):
    """The output of a run that was killed with two parts of three samples drawn."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            draw(trained, tmp_path / "broken.npz")
    return tmp_path / "broken.npz"


def read(path):
    with np.load(path, allow_pickle=False) as content:
        return content["arr_0"], content["arr_1"]


def test_each_sample_is_that_of_its_seed_and_label(trained, tmp_path):
    summary = draw(trained, tmp_path / "x.npz")
    images, labels = read(tmp_path / "x.npz")
    assert (images.shape, images.dtype) == ((COUNT, 8, 12, 3), np.uint8)
    assert labels.tolist() == [0, 2] * 5 + [0]
    assert len({image.tobytes() for image in images}) == COUNT
    for number in (0, 4, 10):
        alone = sample(
            trained.model, [labels[number]], objective=FlowObjective(), scheduler="flow-euler",
            steps=2, seed=5_000_000 + number, clip=1.0,
        )  # fmt: skip
        pixels = to_uint8(depth_to_space(alone.latents, 2))[0].permute(1, 2, 0).numpy()
        assert np.abs(images[number].astype(int) - pixels).max() <= 1
    assert (summary.progress.drawn, summary.progress.before) == (COUNT, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]  # no work folder


def test_batches_change_nothing_but_rounding(trained, tmp_path):
    for batch in (1, 4, 32):
        draw(trained, tmp_path / f"{batch}.npz", batch)
    one, *others = (read(tmp_path / f"{batch}.npz")[0].astype(int) for batch in (1, 4, 32))
    for other in others:
        assert np.abs(one - other).max() <= 1


def test_processes_change_no_byte(trained, tmp_path):
    draw(trained, tmp_path / "one.npz")
    first, *others = draw_together(trained, tmp_path / "three.npz", 3)
    assert (first.processes, first.progress.drawn, others) == (3, COUNT, [None, None])
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "three.npz").read_bytes()


def test_seed_and_guidance_and_budget_change_pixels(trained, tmp_path):
    options = ({}, {"seed": 6}, {"guidance": 3.0}, {"tokens": 3}, {"precision": "bf16"})
    found = []
    for place, option in enumerate(options):
        draw(trained, tmp_path / f"{place}.npz", 32, **option)
        found.append(read(tmp_path / f"{place}.npz")[0].astype(int))
    for one, other in ((a, b) for a in range(len(found)) for b in range(a)):
        assert np.abs(found[one] - found[other]).max() > 1, (options[one], options[other])
    assert np.abs(found[0] - found[-1]).mean() < 4  # bf16 is near, another seed far
    assert np.abs(found[0] - found[1]).mean() > 20


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "uncond_drop": 0.9}, {"keep": 0.4}])
def test_tokens_are_those_of_the_trace(trained, tmp_path, options):
    summary = draw(trained, tmp_path / "x.npz", 32, **options)
    _, labels = read(tmp_path / "x.npz")
    guided = {"guidance_scale": options.pop("guidance"), "guided_channels": 12} if (
        "guidance" in options
    ) else {}  # fmt: skip
    measured = measure_sampling(
        trained.model, labels.tolist(), objective=FlowObjective(), scheduler="flow-euler",
        steps=2, seed=5_000_000, clip=1.0, **options, **guided,
    )  # fmt: skip
    assert summary.cost.tokens == pytest.approx(measured.cost.mean_tokens)
    assert summary.cost.tokens != 24
    assert summary.cost.seconds > 0


def test_tokens_of_a_fixed_patch_model_and_another_objective(tmp_path):
    card = CARD.model_copy(update={"objective": "hybrid"})
    model = make_model(DiT, patch_size=2, learn_sigma=True)
    summary = draw(
        TrainedModel(model, card), tmp_path / "x.npz", guidance=2.0, scheduler="ddpm",
        objective=HybridObjective(),
    )  # fmt: skip
    assert summary.cost.tokens == 12  # 2 x 3 patches, twice
    assert len(read(tmp_path / "x.npz")[0]) == COUNT


class TestResuming:
    def test_no_byte_changes(self, trained, broken, tmp_path):
        folder = tmp_path / "broken.npz.parts"
        assert len(list(folder.glob("samples-*"))) == 2
        draw(trained, tmp_path / "whole.npz")
        seen = []
        summary = draw_to_file(
            make_painter(trained), SampleStore(broken, make_painter(trained).plan), batch=3,
            on_progress=seen.append,
        )  # fmt: skip
        assert [now.drawn for now in seen] == [9, 11]
        assert (summary.progress.before, summary.progress.seconds_left) == (6, 0)
        assert broken.read_bytes() == (tmp_path / "whole.npz").read_bytes()
        assert not folder.exists()

    def test_in_other_batches_by_more_processes(self, trained, broken, tmp_path):
        draw(trained, tmp_path / "whole.npz")
        first, *_ = draw_together(trained, broken, 3, batch=2)
        assert first.progress.before == 6
        a, b = read(broken)[0].astype(int), read(tmp_path / "whole.npz")[0].astype(int)
        assert np.abs(a - b).max() <= 1
        assert np.array_equal(a[:6], b[:6])

    def test_damaged_part_is_drawn_anew(self, trained, broken, tmp_path):
        draw(trained, tmp_path / "whole.npz")
        first, second = sorted((tmp_path / "broken.npz.parts").glob("samples-*"))
        first.write_bytes(first.read_bytes()[:-20])
        second.rename(second.with_name("samples-00000003-00000005.safetensors"))  # one too many
        assert draw(trained, broken).progress.before == 0
        assert broken.read_bytes() == (tmp_path / "whole.npz").read_bytes()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"seed": 6}, "seed 5 there, 6 now"),
            ({"steps": 3}, "steps 2 there, 3 now"),
            ({"guidance": 2.0}, "guidance 1.0 there, 2.0 now"),
            ({"drop": 0.2, "count": 12}, "count 11 there, 12 now; drop none there, 0.2 now"),
            ({"labels": (1,)}, r"labels \(0, 2\) there, \(1,\) now"),
            ({"classes": "drawn"}, "classes balanced there, drawn now"),
            ({"precision": "bf16"}, "precision no there, bf16 now"),
            ({"height": 16}, "height 8 there, 16 now"),
            ({"weights": "b" * 64}, r"weights [0-9a-f]{12}\.\.\. there, bbbbbbbbbbbb\.\.\. now"),
        ],
    )
    def test_another_run_is_refused(self, trained, broken, options, message):
        before = sorted((broken.with_name("broken.npz.parts")).iterdir())
        with pytest.raises(ConfigError, match=message) as caught:
            draw(trained, broken, **options)
        assert "to go on with it, remove it to lose the 6 samples in it" in str(caught.value)
        assert sorted((broken.with_name("broken.npz.parts")).iterdir()) == before

    def test_another_name_of_the_same_model_is_the_same(self, trained, broken):
        assert draw(trained, broken, model="other/name").progress.before == 6

    def test_plan_that_cannot_be_read(self, trained, broken):
        (broken.with_name("broken.npz.parts") / "run.json").write_text("{")
        with pytest.raises(ConfigError, match=r"broken\.npz\.parts cannot be used"):
            draw(trained, broken)

    def test_folder_without_a_sample_is_taken_over(self, trained, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            stop_after(patch, 0)
            with pytest.raises(KeyboardInterrupt):
                draw(trained, tmp_path / "x.npz")
        assert draw(trained, tmp_path / "x.npz", seed=9).progress.before == 0

    @pytest.mark.parametrize("moment", ["write", "unlink", "rename"])
    def test_kill_while_parts_are_joined(self, trained, tmp_path, monkeypatch, moment):
        draw(trained, tmp_path / "whole.npz")
        output = tmp_path / "x.npz"
        path_type = type(output)
        with monkeypatch.context() as patch:
            done = {"write": sample_store.write_npz, "unlink": path_type.unlink,
                    "rename": path_type.rename}[moment]  # fmt: skip

            def die(path, *more, **options):
                if moment == "write":
                    done(path, *more, **options)
                    raise KeyboardInterrupt
                is_last = moment == "unlink" and path.name.startswith("samples-00000003")
                if is_last or (moment == "rename" and path.name == "joined.npz"):
                    raise KeyboardInterrupt
                return done(path, *more, **options)

            if moment == "write":
                patch.setattr(sample_store, "write_npz", die)
            else:
                patch.setattr(path_type, moment, die)
            with pytest.raises(KeyboardInterrupt):
                draw(trained, output)
        assert not output.exists()
        summary = draw(trained, output)
        assert summary.progress.before == COUNT
        assert (summary.cost is None) == (moment != "write")
        assert output.read_bytes() == (tmp_path / "whole.npz").read_bytes()
        assert not tmp_path.joinpath("x.npz.parts").exists()


class TestBadInput:
    def test_more_processes_than_samples(self, trained, tmp_path):
        painter = make_painter(trained)
        store = SampleStore(tmp_path / "x.npz", painter.plan)
        with pytest.raises(ConfigError, match="12 processes for 11 samples: start at most 11"):
            draw_to_file(painter, store, share=Share(11, 12))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("count", [0, -3, 1_000_001])
    def test_wrong_count(self, trained, count):
        with pytest.raises(ConfigError, match=f"count: .*got {count}"):
            make_painter(trained, count=count)

    def test_no_label_and_no_batch(self, trained, tmp_path):
        with pytest.raises(ConfigError, match=r"labels: .*at least 1"):
            make_painter(trained, labels=())
        with pytest.raises(ConfigError, match="a batch has at least 1 sample, got 0"):
            draw(trained, tmp_path / "x.npz", 0)

    def test_wrong_options_leave_nothing(self, trained, tmp_path):
        with pytest.raises(BudgetError, match="more than the 24 cells"):
            draw(trained, tmp_path / "x.npz", tokens=25)
        with pytest.raises(ConfigError, match="this model was trained for 'flow'"):
            draw(trained, tmp_path / "x.npz", scheduler="ddpm")
        assert not list(tmp_path.iterdir())

    def test_output_exists(self, trained, tmp_path):
        (tmp_path / "x.npz").write_text("mine")
        with pytest.raises(ConfigError, match=r"x\.npz exists: remove it, or give another"):
            draw(trained, tmp_path / "x.npz")
        assert (tmp_path / "x.npz").read_text() == "mine"

    def test_output_that_comes_up_meanwhile(self, trained, tmp_path):
        painter = make_painter(trained)
        path = tmp_path / "x.npz"
        with pytest.raises(ConfigError, match="has come up while samples were drawn"):
            draw_to_file(
                painter, SampleStore(path, painter.plan), on_progress=lambda _: path.write_text("")
            )
        path.unlink()
        assert draw(trained, path).progress.before == COUNT

    def test_work_folder_of_something_else(self, trained, tmp_path):
        folder = tmp_path / "x.npz.parts"
        folder.mkdir()
        (folder / "notes.txt").write_text("")
        with pytest.raises(StorageError, match=r"holds other files \(notes.txt\)"):
            draw(trained, tmp_path / "x.npz")
        (folder / "notes.txt").unlink()
        folder.rmdir()
        folder.write_text("")
        with pytest.raises(StorageError, match=r"x\.npz\.parts is a file"):
            draw(trained, tmp_path / "x.npz")

    def test_disk_too_small(self, trained, tmp_path, monkeypatch):
        usage = type("Usage", (), {"free": 5_000})
        monkeypatch.setattr(sample_store.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(StorageError, match=r"0\.0 GB free, and 11 images of 12x8 px need"):
            draw(trained, tmp_path / "x.npz")

    @pytest.mark.parametrize("name", ["save_tensors", "write_npz"])
    def test_disk_full(self, trained, tmp_path, monkeypatch, name):
        write, calls = getattr(sample_store, name), []

        def fill(path, *more):
            calls.append(path)
            if name == "save_tensors" and len(calls) < 3:
                return write(path, *more)
            path.write_bytes(b"half")
            raise StorageError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(sample_store, name, fill)
            with pytest.raises(StorageError, match=r"No space left.*free some space and run") as e:
                draw(trained, tmp_path / "x.npz")
        assert ("samples 6 to 8" in str(e.value)) == (name == "save_tensors")
        parts = {path.name for path in (tmp_path / "x.npz.parts").iterdir()}
        drawn = 2 if name == "save_tensors" else 4
        assert len(parts) == drawn + 1
        assert "run.json" in parts
        assert draw(trained, tmp_path / "x.npz").progress.drawn == COUNT

    def test_part_damaged_while_it_is_joined(self, trained, tmp_path):
        painter = make_painter(trained)
        store = SampleStore(tmp_path / "x.npz", painter.plan)

        def damage(now):
            if now.drawn == COUNT:
                next(store.folder.glob("samples-00000003*")).write_bytes(b"x")

        with pytest.raises(CheckpointError, match="is damaged: run the same command again"):
            draw_to_file(painter, store, batch=3, on_progress=damage)
        assert draw(trained, tmp_path / "x.npz").progress.before == 8


def test_hash_of_a_model(trained):
    first = hash_model(trained, FlowObjective())
    assert first == hash_model(TrainedModel(make_model(), CARD), FlowObjective())
    assert first != hash_model(trained, FlowObjective(shift=2.0))
    assert first != hash_model(
        replace(trained, card=CARD.model_copy(update={"space_to_depth": 1})), FlowObjective()
    )
    other = make_model()
    with torch.no_grad():
        other.router.logit_bias.add_(1e-3)
    assert first != hash_model(TrainedModel(other, CARD), FlowObjective())
    bucketed = make_model(layout="bucketed")
    assert first != hash_model(TrainedModel(bucketed, CARD), FlowObjective())
