import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from adaptok.dc.config import DCDiTConfig, DiTConfig
from adaptok.dc.folder import load_model
from adaptok.errors import AdaptokError, CheckpointError, ConfigError, StorageError
from adaptok.losses import ratio_loss
from adaptok.storage import load_tensors
from adaptok.train.batches import Share, draw_batch, open_training_set
from adaptok.train.checkpoint import list_checkpoints, load_checkpoint
from adaptok.train.config import TrainConfig
from adaptok.train.learner import Learner, Window, average_weights, compile_parts, measure_loss
from adaptok.train.progress import StopRequest, catch_signals, cut_log, read_log
from adaptok.train.trainer import train

CPU = torch.device("cpu")


def randomise(model):
    """Give all weights values that matter, the zeros of a new model too."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, weight in model.named_parameters():
            if weight.requires_grad and not name.startswith("router"):
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        if hasattr(model, "router"):
            model.router.logit_bias.fill_(0.0)
    return model


def take_batch(config, step=0):
    return draw_batch(config, open_training_set(config), step, Share())


def make_learner(config, change=randomise):
    learner = Learner.start(config, CPU)
    change(learner.model)
    for average, weight in zip(learner.ema.values(), learner.weights, strict=True):
        average.copy_(weight)
    return learner


def test_run_leaves_what_it_promises(make_config, tmp_path):
    config, reports = make_config(steps=5), []
    summary = train(config, tmp_path, on_step=reports.append)
    assert (summary.step, summary.steps, summary.interrupted) == (5, 5, False)
    assert summary.images_seen == 40
    assert summary.checkpoint.name == "step-00000005"
    assert [path.name[-2:] for path in list_checkpoints(tmp_path)] == ["04", "05"]
    assert TrainConfig.from_json_file(tmp_path / "config.json") == config
    assert [report.step for report in reports] == [2, 4, 5]
    assert reports == read_log(tmp_path)
    assert summary.loss == reports[-1].loss
    for report in reports:
        parts = report.parts
        assert set(parts) == {"mse", "vb", "ratio"}
        assert report.loss == pytest.approx(parts["mse"] + parts["vb"] + 0.03 * parts["ratio"])
        assert 0 < report.kept <= report.natural <= 1
        assert report.gradient_norm > 0
        assert report.steps_per_second > 0
    assert reports[-1].seconds_left == 0
    trained = load_model(summary.model_folder)
    ema = load_checkpoint(summary.checkpoint).ema
    assert all(torch.equal(value, ema[name]) for name, value in trained.model.state_dict().items())
    assert trained.card.class_names == ("0", "1", "2")
    assert trained.card.training["step"] == 5
    assert str(tmp_path) not in (summary.model_folder / "model.json").read_text()


@pytest.mark.parametrize(("objective", "share"), [("hybrid", 0.3), ("flow", 0.8)])
def test_loss_falls_on_a_problem_that_can_be_learnt(make_config, tmp_path, objective, share):
    config = make_config(
        model=DCDiTConfig(hidden_size=64, depth=1, num_heads=2),
        objective=objective,
        steps=120,
        log_every=20,
        checkpoint_every=1000,
        learning_rate=3e-3,
        batch_size=16,
    )
    reports = []
    train(config, tmp_path, on_step=reports.append)
    assert reports[-1].loss < share * reports[0].loss


def test_baseline_trains_without_budgets(make_config, tmp_path):
    config = make_config(model=DiTConfig(hidden_size=32, depth=1, num_heads=2), budget_warmup=0)
    reports = []
    train(config, tmp_path, on_step=reports.append)
    assert set(reports[0].parts) == {"mse", "vb"}
    assert reports[0].kept == 1.0
    assert load_model(tmp_path / "model").model.config == config.model


@pytest.mark.parametrize("objective", ["hybrid", "flow"])
def test_loss_is_the_objective_and_the_weighted_ratio(make_config, objective):
    config = make_config(objective=objective, ratio_weight=0.5)
    model = make_learner(config).model
    batch = take_batch(config)
    found = measure_loss(model, config, batch, 0.5)
    parts = found["mse"] + found.get("vb", 0.0)
    torch.testing.assert_close(found["loss"], parts + 0.5 * found["ratio"])
    assert found["kept"] < found["natural"]
    whole = measure_loss(model, config, batch, 0.0)
    assert whole["kept"] == whole["natural"] == found["natural"]
    assert whole["ratio"] == found["ratio"]
    assert whole["mse"] != found["mse"]


def test_ratio_loss_gets_target_and_group(make_config, monkeypatch):
    from adaptok.train import learner

    seen = []

    def spy(routing, target, group_size):
        seen.append((target, group_size))
        return ratio_loss(routing, target, group_size)

    monkeypatch.setattr(learner, "ratio_loss", spy)
    model = DCDiTConfig(hidden_size=32, depth=1, num_heads=2, target=3.0)
    config = make_config(model=model, ratio_group=4)
    measure_loss(make_learner(config).model, config, take_batch(config), 0.0)
    assert seen == [(3.0, 4)]


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing_but_rounding(make_config, parts):
    learners = []
    for accumulation in (1, parts):
        config = make_config(accumulation=accumulation, gradient_clip=None, budget_warmup=0)
        learner = make_learner(config)
        learner.take_step(take_batch(config), 0)
        learners.append(learner)
    one, many = (learner.moments() for learner in learners)
    for name in one:
        if name.startswith("exp_avg."):  # a tenth of the gradient
            torch.testing.assert_close(many[name], one[name], atol=1e-6, rtol=1e-5)
    assert max(float(value.abs().max()) for value in one.values()) > 1e-2
    windows = [learner.window.read(lambda x: x) for learner in learners]
    assert windows[1] == pytest.approx(windows[0], rel=1e-5)


def test_gradients_are_clipped_to_the_limit(make_config):
    norms = []
    for limit in (None, 1e-3):
        config = make_config(gradient_clip=limit)
        learner = make_learner(config)
        learner.take_step(take_batch(config), 0)
        squares = [
            value.square().sum()
            for name, value in learner.moments().items()
            if name.startswith("exp_avg.")
        ]
        norms.append(10 * torch.stack(squares).sum().sqrt().item())
        measured = learner.window.read(lambda x: x)["gradient_norm"]
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)
    assert norms[0] == pytest.approx(measured, rel=1e-3)
    assert norms[0] > 0.01


def test_average_follows_the_weights(make_config):
    averages, weights = [torch.zeros(3), torch.ones(2)], [torch.ones(3), torch.ones(2)]
    average_weights(averages, weights, 0.75)
    assert averages[0].tolist() == [0.25] * 3
    assert averages[1].tolist() == [1.0] * 2
    config = make_config(ema_decay=0.2)
    learner = make_learner(config)
    expected = {name: value.clone() for name, value in learner.ema.items()}
    for step in range(3):
        learner.take_step(take_batch(config, step), step)
        decay = min(0.2, (1 + step) / (10 + step))
        for name, value in learner.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in expected.items():
        torch.testing.assert_close(learner.ema[name], value, atol=1e-6, rtol=1e-5)
    assert torch.equal(learner.ema["position"], learner.model.position)


# torch hides this warning of its own only from filters that are not errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("kind", [DCDiTConfig, DiTConfig])
def test_compiled_parts_keep_names_and_values(make_config, kind):
    torch.compiler.reset()
    config = make_config(model=kind(hidden_size=32, depth=2, num_heads=2))
    learner, compiled = make_learner(config), make_learner(config)
    compile_parts(compiled.model, backend="eager")
    assert list(compiled.model.state_dict()) == list(learner.model.state_dict())
    for step in range(3):
        batch = take_batch(config, step)
        learner.take_step(batch, step)
        compiled.take_step(batch, step)
    torch.testing.assert_close(compiled.moments(), learner.moments(), atol=1e-5, rtol=1e-3)


# torch itself warns of RMSNorm under autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_nearly_the_same(make_config, precision):
    losses = {}
    for kind in ("no", precision):
        config = make_config(precision=kind)
        learner = make_learner(config)
        learner.take_step(take_batch(config), 0)
        losses[kind] = learner.window.read(lambda x: x)
        assert all(value.dtype == torch.float32 for value in learner.ema.values())
    assert losses[precision]["mse"] == pytest.approx(losses["no"]["mse"], rel=0.05)
    assert losses[precision]["mse"] != losses["no"]["mse"]


def test_window_sums_on_the_device():
    window = Window()
    assert window.read(lambda x: x) == {}
    for value in (1.0, 2.0):
        window.add({"a": torch.tensor(value), "b": torch.tensor(3.0, requires_grad=True)})
    assert window.read(lambda x: x) == {"a": 3.0, "b": 6.0}
    assert (window.steps, window.sums.requires_grad) == (2, False)


def test_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(make_config, tmp_path):
    config = make_config(learning_rate=1e30, checkpoint_every=1, log_every=3)
    with pytest.raises(AdaptokError, match=r"not a finite number at step 2: .*step-00000001 is in"):
        train(config, tmp_path)
    (folder,) = list_checkpoints(tmp_path)
    assert all(value.isfinite().all() for value in load_checkpoint(folder).model.values())


def test_first_bad_step_is_named_however_late_it_is_noticed(make_config, tmp_path):
    config = make_config(learning_rate=1e30, log_every=6, checkpoint_every=6)
    with pytest.raises(AdaptokError, match=r"at step 2: .*no checkpoint was written yet"):
        train(config, tmp_path)
    assert list_checkpoints(tmp_path) == []
    assert not (tmp_path / "model").exists()


def test_wrong_model_data_and_processes_are_refused_at_the_start(make_config, tmp_path):
    with pytest.raises(ConfigError, match="num_classes=1000 where 3 is needed"):
        train(make_config(fit=False), tmp_path)
    with pytest.raises(ConfigError, match="stop_after is at least 1 step, got 0"):
        train(make_config(), tmp_path, stop_after=0)
    assert list(tmp_path.iterdir()) == []


def test_other_options_in_the_same_folder_are_refused(make_config, tmp_path):
    train(make_config(), tmp_path, stop_after=2)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"seed=0 was saved and 1 came.*another output folder"):
        train(make_config(seed=1), tmp_path)
    with pytest.raises(ConfigError, match=r"already holds a run .*step-00000002.*resume it"):
        train(make_config(), tmp_path, resume=False)
    with pytest.raises(ConfigError, match=r"has done 2 steps and steps=1: ask for more"):
        train(make_config(steps=1), tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_damaged_newest_checkpoint_is_named_and_the_one_before_serves(make_config, tmp_path):
    train(make_config(), tmp_path, stop_after=5)
    older, newest = list_checkpoints(tmp_path)
    path = newest / "ema.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=r"step-00000005.*ema.safetensors.*Delete"):
        train(make_config(), tmp_path)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert older.name == "step-00000004"
    assert train(make_config(), tmp_path).step == 6


def test_folder_that_cannot_be_made(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make the folder"):
        train(make_config(), tmp_path / "file" / "run")


def test_log_on_a_full_disk(make_config, tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    from adaptok.train.progress import StepReport, append_to_log

    report = StepReport(1, 2, 0.5, {}, 1, 1, 0, 1, 1, 1, 1, 1, 1)
    with pytest.raises(StorageError, match=r"cannot write .*log.jsonl: .*No space left"):
        append_to_log(tmp_path, report)


def test_log_is_cut_to_whole_lines_up_to_a_step(make_config, tmp_path):
    train(make_config(), tmp_path)
    reports = read_log(tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "steps": 9, "lo')
    assert cut_log(tmp_path, 4) == reports[1]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert cut_log(tmp_path, 0) is None


def test_signals_become_requests_and_handlers_come_back(monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with catch_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes the same Ctrl-C on
        stop.since -= 5
        with pytest.raises(KeyboardInterrupt):
            stop.receive(signal.SIGINT, None)
        stop.receive(signal.SIGTERM, None)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert not StopRequest().requested


def test_interrupt_finishes_the_step_and_saves(make_config, tmp_path):
    def interrupt(report):
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    config = make_config(log_every=1, checkpoint_every=100, steps=50)
    summary = train(config, tmp_path, on_step=interrupt)
    assert summary.interrupted
    assert summary.step in (3, 4)
    assert load_checkpoint(summary.checkpoint).state.step == summary.step
    assert load_model(summary.model_folder).card.training["step"] == summary.step


CHILD = """
import sys
from adaptok.train.config import TrainConfig
from adaptok.train.trainer import train
summary = train(TrainConfig.from_json_file(sys.argv[1]), sys.argv[2],
                on_step=lambda report: print(report.step, flush=True))
sys.exit(130 if summary.interrupted else 0)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_of_a_real_process_with_workers(make_config, tmp_path, number):
    config = make_config(log_every=1, checkpoint_every=10**6, steps=10**6, workers=1)
    config.to_json_file(tmp_path / "c.json")
    (tmp_path / "child.py").write_text(CHILD)
    child = subprocess.Popen(
        [sys.executable, tmp_path / "child.py", tmp_path / "c.json", tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout.readline().strip() == "1"
    os.killpg(child.pid, number)  # as a terminal does: workers get it too
    out, error = child.communicate(timeout=120)
    assert child.returncode == 130, error
    assert "Traceback" not in error
    (folder,) = list_checkpoints(tmp_path / "run")
    done = int(out.split()[-1]) if out.split() else 1
    assert load_checkpoint(folder).state.step == done
    assert load_model(tmp_path / "run" / "model").card.training["step"] == done


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(make_config, tmp_path):
    config = make_config(learning_rate=1e-4, accumulation=2, flip=True, steps=3)
    config.to_json_file(tmp_path / "c.json")
    (tmp_path / "child.py").write_text(CHILD)
    train(config, tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
         tmp_path / "child.py", tmp_path / "c.json", tmp_path / "two"],
        check=True,
        capture_output=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    card = load_model(tmp_path / "two" / "model").card
    assert card.training["processes"] == 2
    one, two = (list_checkpoints(tmp_path / name)[-1] for name in ("one", "two"))
    moments, others = (load_tensors(folder / "optimizer.safetensors") for folder in (one, two))
    for name in moments:
        # sums over the tokens of a sample are taken in another order: 1.2e-6 was seen
        torch.testing.assert_close(others[name], moments[name], atol=3e-6, rtol=0)
    for file in ("model", "ema"):
        a, b = (load_tensors(folder / f"{file}.safetensors") for folder in (one, two))
        apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
        # Where a gradient is nothing but rounding, Adam makes a whole step of it.
        assert (apart > 1e-5).float().mean() < 1e-3
        assert apart.max() < 3 * config.learning_rate
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert (a.kept, a.drop) == pytest.approx((b.kept, b.drop))
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


@pytest.mark.parametrize("inside", [".", "runs/first"])
def test_an_output_in_the_data_folder_is_refused(tmp_path, inside):
    (tmp_path / "red").mkdir()
    with pytest.raises(ConfigError, match="lies in the data folder"):
        train(TrainConfig(data=str(tmp_path)), tmp_path / inside)
    assert [path.name for path in tmp_path.iterdir()] == ["red"]
